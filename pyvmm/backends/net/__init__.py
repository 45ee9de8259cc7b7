"""The host side of network devices: ``base`` says what each kind offers."""

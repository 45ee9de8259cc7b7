"""What Tab offers."""

import pytest

from pyvmm.monitor.hmp.completion import complete


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mig", ["migrate", "migrate_cancel", "migrate_incoming"]),
        ("info st", ["status"]),
        ("info  mig", ["migrate", "migrate_capabilities", "migrate_parameters"]),
        ("help migrate_c", ["migrate_cancel"]),
        ("help info ve", ["version"]),
        ("info registers ", ["-a", "0", "1"]),
        ("info migrate ", ["-a"]),
        ("cpu ", ["0", "1"]),
        ("migrate ", ["-d", "file:"]),
        ("migrate -d f", ["file:"]),
        ("migrate_set_parameter mo", ["mode"]),
        ("migrate_set_parameter mode cpr-", ["cpr-reboot", "cpr-transfer", "cpr-exec"]),
        ("migrate_set_parameter direct-io ", ["on", "off"]),
        ("migrate_set_parameter bogus ", []),
        ("migrate_set_parameter mode cpr-exec ", []),
        ("migrate_set_capability eve", ["events"]),
        ("migrate_set_capability events o", ["on", "off"]),
        ("p/x $ra", ["$rax"]),
        ("x /4wx 8+$rs", ["8+$rsi", "8+$rsp"]),
        ("stop ", []),
        ("bogus ", []),
        ("info status", []),
    ],
)
def test_words(context, line, expected):
    found = [text for text, _ in complete(line, context)]
    if line == "mig":
        found = found[: len(expected)]
    assert found == expected


def test_commands_come_with_their_help(context):
    assert ("stop", "pause the guest") in complete("", context)


def test_files(context, tmp_path):
    (tmp_path / "vm.state").write_text("")
    (tmp_path / "vms").mkdir()
    (tmp_path / ".hidden").write_text("")
    found = [text for text, _ in complete(f"migrate -d file:{tmp_path}/", context)]
    assert found == [f"file:{tmp_path}/vm.state", f"file:{tmp_path}/vms/"]
    assert complete(f"migrate file:{tmp_path}/none/", context) == []

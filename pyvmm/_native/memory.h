/* Guest memory, for Python: functions of a module, that raise OSError with EFAULT. */
#pragma once

int pyvmm_add_functions(void *module);

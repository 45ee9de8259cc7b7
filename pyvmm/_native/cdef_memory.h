/* Guest memory that the host may be unable to back (guard.c). */

int pyvmm_install_guard(void);
int pyvmm_add_functions(void *module);

#define KVM_X86_SHADOW_INT_MOV_SS ...

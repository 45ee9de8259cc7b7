/* u64 torture_burst(void): with gs at a struct torture (torture.h), loads every register from its
 * `want`, spins, stores every register to its `got`. Ring 3. */
#include "torture.h"

.macro vectors level, op
    .if \level == 1
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    \op \n, ymm
    .endr
    .else
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    \op \n, zmm
    .endr
    .endif
.endm
.macro load_ymm n, kind
    vmovdqu %gs:T_WANT + R_VEC + 64 * \n, %\kind\n
.endm
.macro save_ymm n, kind
    vmovdqu %\kind\n, %gs:T_GOT + R_VEC + 64 * \n
.endm
.macro load_zmm n, kind
    vmovdqu64 %gs:T_WANT + R_VEC + 64 * \n, %\kind\n
.endm
.macro save_zmm n, kind
    vmovdqu64 %\kind\n, %gs:T_GOT + R_VEC + 64 * \n
.endm
.macro masks op, from, to
    .irp n, 0,1,2,3,4,5,6,7
    .ifc \op, load
    kmovw %gs:T_WANT + R_K + 8 * \n, %k\n
    .else
    kmovw %k\n, %gs:T_GOT + R_K + 8 * \n
    .endif
    .endr
.endm
/* Every general register, in the order of the instruction set's numbers. */
.macro general op
    .set at, 0
    .irp reg, rax,rcx,rdx,rbx,rsp,rbp,rsi,rdi,r8,r9,r10,r11,r12,r13,r14,r15
    .ifc \op, load
    movq %gs:T_WANT + R_GPR + at, %\reg
    .else
    movq %\reg, %gs:T_GOT + R_GPR + at
    .endif
    .set at, at + 8
    .endr
.endm
.macro each_segment op
    .set at, 0
    .irp reg, ds,es,fs,gs
    .ifc \op, load
    .if at < 16                     /* a load of fs or gs would replace the base */
    movw %gs:T_WANT + R_SEG + at, %\reg
    .endif
    .else
    movw %\reg, %gs:T_GOT + R_SEG + at
    .endif
    .set at, at + 8
    .endr
.endm

    .text
    .global torture_burst
torture_burst:
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, %gs:T_STACK
    fxrstor64 %gs:T_WANT + R_FX
    cmpl $1, %gs:T_LEVEL
    jb 1f
    ja 2f
    vectors 1, load_ymm
    jmp 1f
2:  vectors 2, load_zmm
    masks load
1:  each_segment load
    general load
1:  decq %gs:T_SPINS                /* no register is free, the stack pointer is not one */
    jnz 1b
    general save
    each_segment save
    movq %gs:T_STACK, %rsp
    movq %gs:T_SPINS2, %rcx
    pushq %gs:T_WANT + R_FLAGS
    popfq
1:  loop 1b                         /* changes no flag */
    pushfq
    popq %gs:T_GOT + R_FLAGS
    pushq $2
    popfq
    movq %fs:0, %rax                /* the bases at work */
    movq %rax, %gs:T_GOT + R_FS0
    movq %gs:0, %rax
    movq %rax, %gs:T_GOT + R_GS0
    cmpl $1, %gs:T_LEVEL
    jb 1f
    ja 2f
    vectors 1, save_ymm
    jmp 1f
2:  vectors 2, save_zmm
    masks save
1:  fxsave64 %gs:T_GOT + R_FX
    movl $0x23, %eax
    movl %eax, %ds
    movl %eax, %es
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbp
    popq %rbx
    ret
    .section .note.GNU-stack, "", @progbits

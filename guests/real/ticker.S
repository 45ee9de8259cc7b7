/* Real mode: known values in the general and segment registers, checked for ever; every 4096 rounds a
 * line "real-ticker" and the count in hexadecimal. The round count lives in ebp alone. */
#include "real.h"

/* Fails with NAME unless REG holds VALUE. */
.macro check reg, value, name
    cmp \value, \reg
    jne bad_\name
.endm
/* The same for a segment register. */
.macro check_segment reg, value
    movw %\reg, %ax
    cmpw \value, %ax
    jne bad_\reg
.endm
.macro bad name
bad_\name:
    movw $text_\name, %si
    jmp fail
text_\name:
    .asciz "real-ticker FAIL \name"
.endm

begin:
    xorl %ebp, %ebp
set:
    movl $0x11111111, %ebx
    movl $0x22222222, %ecx
    movl $0x44444444, %esi
    movl $0x55555555, %edi
    movw $0x1234, %ax
    movw %ax, %ds
    movw $0x2345, %ax
    movw %ax, %es
    movw $0x3456, %ax
    movw %ax, %fs
    movw $0x4567, %ax
    movw %ax, %gs
round:
    check %ebx, $0x11111111, ebx
    check %ecx, $0x22222222, ecx
    check %esi, $0x44444444, esi
    check %edi, $0x55555555, edi
    check %sp, $0x7c00, sp
    check_segment ds, $0x1234
    check_segment es, $0x2345
    check_segment fs, $0x3456
    check_segment gs, $0x4567
    check_segment ss, $0
    check_segment cs, $0
    incl %ebp
    testl $0xfff, %ebp
    jnz round
    movw $prefix, %si
    call puts
    movl %ebp, %eax
    shrl $12, %eax
    call puthex
    jmp set

    .irp name, ebx, ecx, esi, edi, sp, ds, es, fs, gs, ss, cs
    bad \name
    .endr
prefix:
    .asciz "real-ticker "

/* Real mode: the PIT interrupts through the IVT at 100 Hz, the CPU is halted in between; every tenth
 * interrupt a line "real-halt" and the count in hexadecimal. */
#include "real.h"

begin:
    movw $timer, 8 * 4              /* interrupt 0 at vector 8 */
    movw $0, 8 * 4 + 2
    movb $0x11, %al                 /* PIC: edge, cascade, vector base 8, 8086 mode, line 0 only */
    outb %al, $0x20
    movb $8, %al
    outb %al, $0x21
    movb $4, %al
    outb %al, $0x21
    movb $1, %al
    outb %al, $0x21
    movb $0xfe, %al
    outb %al, $0x21
    movb $0x34, %al                 /* PIT channel 0, mode 2, 11932 = 100 Hz */
    outb %al, $0x43
    movw $11932, %ax
    outb %al, $0x40
    movb %ah, %al
    outb %al, $0x40
    xorl %ebp, %ebp
    movl $10, %ebx
loop:
    cmpl %ebx, ticks
    jae 1f
    sti
    hlt
    cli
    jmp loop
1:  addl $10, %ebx
    incl %ebp
    movw $prefix, %si
    call puts
    movl %ebp, %eax
    call puthex
    jmp loop

timer:
    pushw %ax
    incl %cs:ticks
    movb $0x20, %al
    outb %al, $0x20
    popw %ax
    iretw

    .balign 4
ticks:
    .long 0
prefix:
    .asciz "real-halt "

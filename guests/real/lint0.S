/* Real mode: the PIT's interrupt comes to the PIC while LINT0 of the local APIC is masked, and LINT0 is
 * opened then, with interrupts enabled all the time: as operating systems do that set up the local APIC
 * but let the PIC deliver. The CPU is halted after that; every tenth interrupt a line "real-lint0" and the
 * count in hexadecimal. The local APIC's registers are reached as MSRs (x2APIC). */
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
    movl $0x1b, %ecx                /* IA32_APIC_BASE: enabled, as x2APIC */
    rdmsr
    orw $0xc00, %ax
    wrmsr
    movl $0x835, %ecx               /* LINT0: ExtINT, masked */
    movl $0x10700, %eax
    xorl %edx, %edx
    wrmsr
    sti
    movb $0x34, %al                 /* PIT channel 0, mode 2, 11932 = 100 Hz */
    outb %al, $0x43
    movw $11932, %ax
    outb %al, $0x40
    movb %ah, %al
    outb %al, $0x40
    movb $0x0a, %al                 /* until the PIC has a request */
    outb %al, $0x20
1:  inb $0x20, %al
    testb $1, %al
    jz 1b
    movl $0x700, %eax               /* LINT0: ExtINT */
    wrmsr
    movl $10, %ebx
    xorl %ebp, %ebp
loop:
    hlt
    cmpl %ebx, ticks
    jb loop
    addl $10, %ebx
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
    .asciz "real-lint0 "

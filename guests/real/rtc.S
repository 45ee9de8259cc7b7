/* Real mode: the RTC interrupts 32 times a second, the CPU is halted in between; every eighth
 * interrupt a line "real-rtc" and the count in hexadecimal. */
#include "real.h"

begin:
    movw $clock, 0x70 * 4           /* interrupt 8 at vector 0x70 */
    movw $0, 0x70 * 4 + 2
    movb $0x11, %al                 /* PICs: edge, cascade, vector bases 8 and 0x70, 8086 mode */
    outb %al, $0x20
    outb %al, $0xa0
    movb $8, %al
    outb %al, $0x21
    movb $0x70, %al
    outb %al, $0xa1
    movb $4, %al
    outb %al, $0x21
    movb $2, %al
    outb %al, $0xa1
    movb $1, %al
    outb %al, $0x21
    outb %al, $0xa1
    movb $0xfb, %al                 /* line 2, the cascade, and line 8 only */
    outb %al, $0x21
    movb $0xfe, %al
    outb %al, $0xa1
    movb $10, %al                   /* register A: 32 Hz */
    outb %al, $0x70
    movb $0x2b, %al
    outb %al, $0x71
    movb $12, %al                   /* register C: what was before shall not interrupt */
    outb %al, $0x70
    inb $0x71, %al
    movb $11, %al                   /* register B: periodic interrupt, 24 hours */
    outb %al, $0x70
    movb $0x42, %al
    outb %al, $0x71
    xorl %ebp, %ebp
    movl $8, %ebx
loop:
    cmpl %ebx, ticks
    jae 1f
    sti
    hlt
    cli
    jmp loop
1:  addl $8, %ebx
    incl %ebp
    movw $prefix, %si
    call puts
    movl %ebp, %eax
    call puthex
    jmp loop

clock:
    pushw %ax
    movb $12, %al                   /* without reading register C there is no next one */
    outb %al, $0x70
    inb $0x71, %al
    andb $0xc0, %al
    cmpb $0xc0, %al
    je 1f
    movw $unasked, %si
    jmp fail
1:  incl %cs:ticks
    movb $0x20, %al
    outb %al, $0xa0
    outb %al, $0x20
    popw %ax
    iretw

    .balign 4
ticks:
    .long 0
prefix:
    .asciz "real-rtc "
unasked:
    .asciz "real-rtc FAIL interrupt without its flag"

/* Real mode: a tight loop of out and in on the serial scratch register, each byte read back; every
 * 1024 rounds a line "real-pio" and the count in hexadecimal. */
#include "real.h"

begin:
    xorl %ebp, %ebp
    movw $0x3ff, %dx
round:
    movw %bp, %ax
    xorb %ah, %al
    movb %al, %bl
    outb %al, %dx
    xorb $0xff, %al
    inb %dx, %al
    cmpb %bl, %al
    jne bad
    incl %ebp
    testl $0x3ff, %ebp
    jnz round
    movw $prefix, %si
    call puts
    movl %ebp, %eax
    shrl $10, %eax
    call puthex
    movw $0x3ff, %dx
    jmp round
bad:
    movw $text, %si
    jmp fail
text:
    .asciz "real-pio FAIL scratch"
prefix:
    .asciz "real-pio "

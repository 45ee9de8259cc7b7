/* Shared by the flat real-mode images: entered at 0000:7c00 with ds = es = ss = 0, sp = 0x7c00,
 * interrupts off. cs stays 0, so cs: reaches strings and variables whatever ds holds. */
    .code16
    .text
    .global _start
_start:
    jmp begin

    .org 510                        /* what makes it a boot sector, and known as a flat image */
    .short 0xaa55

/* al to the serial port; spoils ah, dx. */
putc:
    movb %al, %ah
    movw $0x3fd, %dx
1:  inb %dx, %al
    testb $0x20, %al
    jz 1b
    movb %ah, %al
    movw $0x3f8, %dx
    outb %al, %dx
    ret

/* The string at cs:si; spoils ax, dx, si. */
puts:
    movb %cs:(%si), %al
    incw %si
    testb %al, %al
    jz 1f
    call putc
    jmp puts
1:  ret

/* eax as eight hex digits and an end of line; spoils eax, cx, dx, si. */
puthex:
    movw $8, %cx
2:  roll $4, %eax
    pushl %eax
    andb $15, %al
    addb $'0', %al
    cmpb $'9', %al
    jbe 3f
    addb $'a' - '9' - 1, %al
3:  call putc
    popl %eax
    loop 2b
    movw $newline, %si
    jmp puts
newline:
    .asciz "\r\n"

/* The string at cs:si, then isa-debug-exit (at 0xf4 or 0x501) with 0x21, pvpanic, and halt. */
fail:
    call puts
    movw $newline, %si
    call puts
    movb $0x21, %al
    outb %al, $0xf4
    movw $0x501, %dx
    outb %al, %dx
    movw $0x505, %dx
    movb $1, %al
    outb %al, %dx
1:  cli
    hlt
    jmp 1b

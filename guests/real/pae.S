/* 32-bit protected mode with PAE paging: the processor has read the four page-directory-pointer
 * registers when CR3 was loaded. The third in memory is cleared then, but what it maps is there
 * until CR3 is loaded again: read, and every 256 times a line "real-pae". */
#include "real.h"

#define PDPT 0x20000
#define PD 0x21000
#define THIRD_PD 0x22000
#define IDT 0x23000
#define VALUE 0x6b8b4567

begin:
    cli
    lgdt gdtr
    movl %cr0, %eax
    orb $1, %al
    movl %eax, %cr0
    ljmp $8, $protected

    .code32
protected:
    movw $16, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $0x7c00, %esp
    movl $without, %eax             /* exception 13: some KVMs page in long mode only */
    movw %ax, IDT + 13 * 8
    movl $0x8e000008, IDT + 13 * 8 + 2
    shrl $16, %eax
    movw %ax, IDT + 13 * 8 + 6
    movl $anew, %eax                /* exception 14: AMD's CPUs read them when they need them */
    movw %ax, IDT + 14 * 8
    movl $0x8e000008, IDT + 14 * 8 + 2
    shrl $16, %eax
    movw %ax, IDT + 14 * 8 + 6
    lidt idtr
    movl $PDPT, %edi
    xorl %eax, %eax
    movl $3 * 1024, %ecx
    cld
    rep stosl
    movl $PD + 1, PDPT
    movl $0x83, PD                  /* the first 2 MiB */
    movl $THIRD_PD + 1, PDPT + 16
    movl $0x200083, THIRD_PD + 8    /* 0x80200000: the second 2 MiB */
    movl $VALUE, 0x2ffffc
    movl $0x20, %eax                /* PAE */
    movl %eax, %cr4
    movl $PDPT, %eax
    movl %eax, %cr3
    movl %cr0, %eax
    orl $0x80000000, %eax
    movl %eax, %cr0
    jmp 1f
1:  movl $0, PDPT + 16
    invlpg 0x802ffffc
    cmpl $VALUE, 0x802ffffc
    jne wrong
    lidt noidt                      /* from here on any exception is the end */
    xorl %ebp, %ebp
loop32:
    incl %ebp
    movl $256, %ebx
1:  invlpg 0x802ffffc
    cmpl $VALUE, 0x802ffffc
    jne wrong
    inb $0x80, %al
    decl %ebx
    jnz 1b
    movl $prefix, %esi
    call puts32
    movl $8, %ecx
    movl %ebp, %edx
2:  roll $4, %edx
    movb %dl, %al
    andb $15, %al
    addb $'0', %al
    cmpb $'9', %al
    jbe 3f
    addb $'a' - '9' - 1, %al
3:  call putc32
    loop 2b
    movl $newline, %esi
    call puts32
    jmp loop32

anew:
    movl $reads, %esi
    jmp 1f
without:
    movl $none, %esi
1:  call puts32
1:  hlt
    jmp 1b

wrong:
    movl $bad, %esi
    call puts32
    movb $0x21, %al
    outb %al, $0xf4
    movw $0x501, %dx
    outb %al, %dx
    movw $0x505, %dx
    movb $1, %al
    outb %al, %dx
1:  hlt
    jmp 1b

/* The string at esi; spoils eax, esi. */
puts32:
    lodsb
    testb %al, %al
    jz 1f
    call putc32
    jmp puts32
1:  ret

/* al to the serial port; spoils ah. */
putc32:
    pushl %edx
    movb %al, %ah
    movw $0x3fd, %dx
1:  inb %dx, %al
    testb $0x20, %al
    jz 1b
    movb %ah, %al
    movw $0x3f8, %dx
    outb %al, %dx
    popl %edx
    ret

    .balign 8
gdt:
    .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdtr:
    .word . - gdt - 1
    .long gdt
idtr:
    .word 15 * 8 - 1
    .long IDT
noidt:
    .word 0
    .long 0
prefix:
    .asciz "real-pae "
none:
    .asciz "real-pae has no paging outside of long mode\r\n"
reads:
    .asciz "real-pae has a processor that reads memory again\r\n"
bad:
    .asciz "real-pae FAIL the third gigabyte is another\r\n"

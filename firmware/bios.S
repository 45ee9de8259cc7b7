/* The reset ROM: enters what the VMM has put into RAM (boot record at 0x500, README.md), in the state
 * that the record's protocol asks for. 64 KiB that end at 4 GiB; the code runs at its high address, so
 * it needs no mirror below 1 MiB. Few instructions: a host may emulate every one. */

#define RECORD 0x500
#define MAGIC 0x424d5650            /* "PVMB" */
#define ROM 0xffff0000

    .code16
    .text
rom:
start:
    cli
    cld
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $0x7c00, %sp
    cmpl $MAGIC, RECORD
    jne nothing
    movl RECORD + 4, %eax           /* kind */
    cmpl $3, %eax
    je flat
    decl %eax
    cmpl $3, %eax
    ja nothing

    /* PVH and multiboot 1 want the same: flat 32-bit segments, paging and interrupts off, a pointer
     * in ebx, and in eax the multiboot magic. TR is still the task state that reset left, which is
     * busy, 32 bit and at base 0 as PVH asks; ltr could not mark one in a read-only GDT anyway. */
    movl RECORD + 12, %ebx
    movl RECORD + 8, %edi
    movl RECORD + 16, %edx
    movl RECORD + 20, %esi
    lgdtl %cs:gdt_pointer - rom
    movl $0x11, %eax                /* PE, ET; caching on */
    movl %eax, %cr0
    ljmpl $0x08, $ROM + protected - rom
    .code32
protected:
    movl $0x18, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %fs
    movl %eax, %gs
    movl %eax, %ss
    testl %esi, %esi
    jnz long_mode
    movl %edx, %eax
    pushl $0                        /* the stack just below 0x7c00; nothing is promised to the kernel */
    popfl
    jmp *%edi

    /* Linux's 64-bit protocol: the boot parameters in rsi, paging by the VMM's tables, and of the
     * segments those that Linux names, which the data segments have already. */
long_mode:
    movl $0x20, %eax                /* PAE */
    movl %eax, %cr4
    movl %esi, %cr3
    movl $0xc0000080, %ecx          /* EFER.LME; reset has left nothing else in it */
    movl $0x100, %eax
    xorl %edx, %edx
    wrmsr
    movl $0x80000011, %eax          /* PG, ET, PE */
    movl %eax, %cr0
    ljmpl $0x10, $ROM + long_code - rom
    .code64
long_code:
    movl %ebx, %esi
    movl %edi, %eax
    pushq $0
    popfq
    jmp *%rax

    .code16
    /* Real-mode code expects the PIC to reach the CPU: LINT0 of the local APIC becomes ExtINT, which
     * stays masked unless the APIC is enabled first. The registers lie beyond real mode's reach, so ds
     * visits protected mode, and leaves with its 64 KiB limit back. No far jump: cs must keep its base. */
flat:
    lgdtl %cs:gdt_pointer - rom
    movl %cr0, %ebx
    movl %ebx, %eax
    orb $1, %al
    movl %eax, %cr0
    movw $0x18, %ax
    movw %ax, %ds
    movl $0xfee00000, %eax
    movl $0x1ff, 0xf0(%eax)
    movl $0x700, 0x350(%eax)
    movw $0x20, %ax
    movw %ax, %ds
    movl %ebx, %cr0
    xorl %eax, %eax
    xorl %ebx, %ebx
    movw %ax, %ds
    ljmp $0, $0x7c00

nothing:
    movw $message - rom, %si
1:  movb %cs:(%si), %al
    incw %si
    testb %al, %al
    jz 3f
    outb %al, $0xe9
    movb %al, %ah
    movw $0x3fd, %dx
    movw $0x1000, %cx               /* a port nobody drains must not hold the ROM for ever */
2:  inb %dx, %al
    testb $0x20, %al
    loopz 2b
    movb %ah, %al
    movw $0x3f8, %dx
    outb %al, %dx
    jmp 1b
3:  hlt
    jmp 3b

message:
    .asciz "pyvmm firmware: nothing to boot\r\n"
    .balign 8
    /* The two in the middle are Linux's __BOOT_CS and __BOOT_DS, which have to lie here. */
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff        /* 08 code; accessed already: the table is read-only */
    .quad 0x00af9b000000ffff        /* 10 64-bit code */
    .quad 0x00cf93000000ffff        /* 18 data */
    .quad 0x000093000000ffff        /* 20 data as in real mode */
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long ROM + gdt - rom

    .org 0xfff0
    jmp start                       /* the first instruction after reset: 0xfffffff0 */
    .org 0x10000

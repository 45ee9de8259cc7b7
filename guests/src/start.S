/* Entries (PVH, multiboot, application processors), long mode, the way to ring 3 and back.
 *
 * Some hosts run ring 0 in an instruction emulator at about 1 M instructions/s: everything that
 * can be is laid out by the assembler (page tables, GDT) or done later in ring 3. */
#include "kernel.h"

#define KCODE 0x08
#define KDATA 0x10
#define UDATA 0x20
#define UCODE 0x28
#define CODE32 0x30
#define TSS 0x40

    .section .note.Xen, "a", @note
    .balign 4
    .long 4, 4, 18                  /* XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz "Xen"
    .long pvh_start

    .section .text.start, "ax"
    .code32
    .global pvh_start, multiboot_start
pvh_start:                          /* Xen PVH: flat 32 bit, paging off, ebx = start_info */
    movl $1, %edi
    jmp 1f
multiboot_start:                    /* multiboot 1: the same, ebx = multiboot_info */
    movl $2, %edi
1:  movl %ebx, %esi
    cld
    lgdt gdt_ptr
    movl $kernel_stacks + STACK_SIZE, %esp
    call enter_long
    ljmp $KCODE, $bsp_long

/* Turns paging and long mode on; the caller makes the far jump. */
enter_long:
    movl $0x620, %eax               /* PAE, OSFXSR, OSXMMEXCPT */
    movl %eax, %cr4
    movl $pml4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx          /* EFER.LME */
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl $0x80010033, %eax          /* PG, WP, NE, ET, MP, PE: ring 3 may use x87 and SSE */
    movl %eax, %cr0
    ret

    .code64
bsp_long:
    xorl %edx, %edx                 /* CPU 0 */
    movl $main, %eax
/* edx = CPU number, rax = ring-3 entry, rdi and rsi = its arguments. */
to_ring3:
    movl $KDATA, %ecx
    movl %ecx, %ss
    movl $UDATA | 3, %ecx
    movl %ecx, %ds
    movl %ecx, %es
    xorl %ecx, %ecx
    movl %ecx, %fs
    movl %ecx, %gs
    lidt idt_ptr
    movl %edx, %ebx
    shll $4, %ebx                   /* its TSS descriptor: base is split over bytes 2-4 and 7 */
    imull $TSS_SIZE, %edx, %ecx
    addl $tss, %ecx
    movl $io_bitmap, %r9d           /* one bitmap for all: all zero, ring 3 may use every port */
    subl %ecx, %r9d
    movw %r9w, 102(%rcx)
    addl $8192, %r9d
    movw %r9w, gdt + TSS(%rbx)
    movw %cx, gdt + TSS + 2(%rbx)
    movl %ecx, %r8d
    shrl $16, %r8d
    movb %r8b, gdt + TSS + 4(%rbx)
    movb $0x89, gdt + TSS + 5(%rbx)
    shrl $8, %r8d
    movb %r8b, gdt + TSS + 7(%rbx)
    leal 1(%rdx), %r8d
    imull $STACK_SIZE, %r8d, %r8d
    leal kernel_stacks(%r8), %r9d
    movq %r9, 4(%rcx)               /* RSP0 */
    movq %r9, %rsp
    leal TSS(%rbx), %ecx
    ltr %cx
    leal user_stacks - 8(%r8), %r9d
    pushq $UDATA | 3
    pushq %r9
    pushq $0x202                    /* IF; not IOPL 3, which not every host carries into ring 3 */
    pushq $UCODE | 3
    pushq %rax
    xorl %ebp, %ebp
    iretq

/* Real-mode start page of the other CPUs, copied to AP_TRAMPOLINE. */
    .global ap_start, ap_end
    .code16
ap_start:
    cli
    lgdtl %cs:ap_gdt_ptr - ap_start
    movl $0x11, %eax
    movl %eax, %cr0
    ljmpl $CODE32, $ap_protected
ap_gdt_ptr:
    .word gdt_end - gdt - 1
    .long gdt
ap_end:
    .code32
ap_protected:
    movl $KDATA, %eax
    movl %eax, %ds
    movl %eax, %ss
    movl $1, %edi
    lock xaddl %edi, cpu_count
    cmpl $MAX_CPUS, %edi
    jae 1f
    movl %edi, %edx
    incl %edx
    imull $STACK_SIZE, %edx, %esp
    addl $kernel_stacks, %esp
    call enter_long
    ljmp $KCODE, $ap_long
1:  cli
    hlt
    jmp 1b
    .code64
ap_long:
    movl %edi, %edx
    movl $ap_main, %eax
    jmp to_ring3

/* u64 ring0(fn, a, b). By an invalid instruction: a host that runs ring 3 on the bare CPU passes
 * exceptions on to the guest's IDT, but not int n, and not syscall with its change of ring. */
    .text
    .global ring0, invalid_opcode, spurious_stub, trap_stubs
ring0:
    movq %rdi, %rax
    movq %rsi, %rdi
    movq %rdx, %rsi
ring0_call:
    ud2
    ret
invalid_opcode:
    cmpq $ring0_call, (%rsp)
    jne trap_stubs + 6 * 16
    addq $2, (%rsp)
    subq $8, %rsp                   /* the ABI's alignment */
    call *%rax
    addq $8, %rsp
spurious_stub:
    iretq

/* One 16-byte stub a vector, 0 to VEC_LAST; the processor pushes an error code on some of them. */
    .balign 16
trap_stubs:
    .set n, 0
    .rept VEC_LAST + 1
    .balign 16
    .if !(n == 8 || (n >= 10 && n <= 14) || n == 17 || n == 21 || n == 29 || n == 30)
    pushq $0
    .endif
    pushq $n
    jmp trap_entry
    .set n, n + 1
    .endr
trap_entry:
    pushq %rax
    pushq %rbx
    pushq %rcx
    pushq %rdx
    pushq %rsi
    pushq %rdi
    pushq %rbp
    pushq %r8
    pushq %r9
    pushq %r10
    pushq %r11
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    cld
    movq %rsp, %rdi
    call trap
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %r11
    popq %r10
    popq %r9
    popq %r8
    popq %rbp
    popq %rdi
    popq %rsi
    popq %rdx
    popq %rcx
    popq %rbx
    popq %rax
    addq $16, %rsp
    iretq

    .data
    .balign 16
    .global gdt, idt, pml4, pdpt, cpu_count
gdt:
    .quad 0
    .quad 0x00af9b000000ffff        /* 08 ring-0 code */
    .quad 0x00cf93000000ffff        /* 10 ring-0 data */
    .quad 0x00cffb000000ffff        /* 18 ring-3 code, 32 bit */
    .quad 0x00cff3000000ffff        /* 20 ring-3 data */
    .quad 0x00affb000000ffff        /* 28 ring-3 code */
    .quad 0x00cf9b000000ffff        /* 30 ring-0 code, 32 bit */
    .quad 0
    .fill MAX_CPUS * 2, 8, 0        /* 40 task states */
gdt_end:
gdt_ptr:
    .word gdt_end - gdt - 1
    .quad gdt
idt_ptr:
    .word 256 * 16 - 1
    .quad idt
    .balign 4
cpu_count:
    .long 1

/* Identity map of the first 4 GiB, user-accessible; RAM above it is added from ring 3 (map_init).
 * The top 32 MiB hold the APICs and the ROM: uncached. */
    .balign 4096
pml4:
    .quad pdpt + 7
    .fill 511, 8, 0
pdpt:
    .quad pd + 0x0007, pd + 0x1007, pd + 0x2007, pd + 0x3007
    .fill 508, 8, 0
pd:
    .set n, 0
    .rept 2032
    .quad n | 0x87
    .set n, n + 0x200000
    .endr
    .rept 16
    .quad n | 0x97
    .set n, n + 0x200000
    .endr

    .bss
    .balign STACK_SIZE
    .global user_stacks, kernel_stacks
user_stacks:
    .fill MAX_CPUS * STACK_SIZE
kernel_stacks:
    .fill MAX_CPUS * STACK_SIZE
idt:
    .fill 4096
    .set TSS_SIZE, 104
tss:
    .fill MAX_CPUS * TSS_SIZE
io_bitmap:
    .fill 8192 + 1

    .section .note.GNU-stack, "", @progbits

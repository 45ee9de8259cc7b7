/* A kernel that Linux's 64-bit boot protocol can enter (boot.rst), in either of two ways: as the ELF
 * file that it is, which is what a vmlinux or an unpacked bzImage looks like, or 0x200 bytes behind
 * its start, as the protected-mode code of a bzImage. check.c says whether the promises were kept. */
    .section .start, "ax"
    .code32
    hlt                             /* the 32-bit entry: nobody is to come in here */
    jmp .
    .org 0x200
    .code64
    movl $as_bzimage, %edi
    jmp 1f
    .global startup_64
startup_64:
    movl $as_elf, %edi
1:  movl $stack_top, %esp           /* none is promised */
    pushfq                          /* before an instruction changes them */
    popq %rdx
    call check
2:  cli
    hlt
    jmp 2b

    .section .rodata
as_bzimage:
    .asciz "bzImage"
as_elf:
    .asciz "ELF"

    .section .note.Linux, "a", @note    /* what shows a loader that an ELF file is Linux */
    .long 6, 4, 0x100                   /* LINUX_ELFNOTE_BUILD_SALT */
    .asciz "Linux"
    .balign 4
    .long 0

    .bss
    .balign 16
    .skip 4096
stack_top:

    .section .note.GNU-stack, "", @progbits

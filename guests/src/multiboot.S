/* Multiboot 1 header: memory information wanted; the ELF headers give the addresses. */
    .section .multiboot, "a"
    .balign 4
    .long 0x1badb002, 2, -(0x1badb002 + 2)
    .section .note.GNU-stack, "", @progbits

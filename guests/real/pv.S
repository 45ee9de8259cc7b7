/* Real mode: pages that KVM's paravirtual registers have pointed to, and that are in use for
 * something else since: 0x2000 to 0x3000 for this boot, 0x3000 to 0x4000 for the boot before
 * this one, which left them on. Every 64 checks of the first a line "real-pv". */
#include "real.h"

#define PATTERN 0x5a5a5a5a

begin:
    movw $0x200, %di
1:  movl $PATTERN, (%di)            /* 0x200 to 0x4000: no interrupt vectors, nor this code */
    addw $4, %di
    cmpw $0x4000, %di
    jb 1b
    movl $8, %ebx                   /* what the boot before left on shall not write any more */
1:  movw $0x200, %si
    call check
    inb $0x80, %al
    decl %ebx
    jnz 1b

    /* A register that is written once tells KVM to write once. */
    movl $0x11, %ecx
    movl $0x2000, %eax
    call set
    movl $0x4b564d00, %ecx
    movl $0x2100, %eax
    call set
    /* The others tell it to write from then on, until bit 0 is taken back. */
    movw $used, %di
    movl $0x2200, %eax
    call each
    movw $0x2000, %di
1:  movl $PATTERN, (%di)
    addw $4, %di
    cmpw $0x3000, %di
    jb 1b
    movw $left, %di
    movl $0x3000, %eax
    call each

    xorl %ebp, %ebp
loop:
    incl %ebp
    movl $64, %ebx
1:  movw $0x2000, %si
    call check
    decl %ebx
    jnz 1b
    movw $prefix, %si
    call puts
    movl %ebp, %eax
    call puthex
    jmp loop

/* The pattern from si to 0x3000 (0x4000 if si is less than 0x2000); spoils si. */
check:
    movw $0x3000, %cx
    cmpw $0x2000, %si
    jae 1f
    movw $0x4000, %cx
1:  cmpl $PATTERN, (%si)
    jne 2f
    addw $4, %si
    cmpw %cx, %si
    jb 1b
    ret
2:  movl (%si), %ebp
    movzwl %si, %eax
    pushl %eax
    movw $found, %si
    call puts
    popl %eax
    call puthex
    movl %ebp, %eax
    call puthex
    movw $harm, %si
    jmp fail

/* The register ecx on at eax, and for those that begin at used off again; then the next ones,
 * 0x100 further on each. */
each:
1:  movl (%di), %ecx
    testl %ecx, %ecx
    jz 2f
    pushl %eax
    orb $1, %al
    call set
    inb $0x80, %al                  /* out of the guest and in again, which makes KVM write */
    popl %eax
    cmpw $left, %di
    jae 3f
    call set
3:  addl $0x100, %eax
    addw $4, %di
    jmp 1b
2:  ret

set:
    xorl %edx, %edx
    wrmsr
    ret

    .balign 4
used:                               /* system time old and new, steal time, async PF, PV EOI */
    .long 0x12, 0x4b564d01, 0x4b564d03, 0x4b564d02, 0x4b564d04, 0
left:
    .long 0x4b564d01, 0x4b564d03, 0x4b564d02, 0x4b564d04, 0
prefix:
    .asciz "real-pv "
found:
    .asciz "\r\nreal-pv at and found "
harm:
    .asciz "real-pv FAIL a page was written that is in use for something else"

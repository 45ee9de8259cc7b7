/* How long a vCPU stands still when another task takes over KVM_RUN, and beside it what an exit
 * costs that another task serves.
 *
 *     move KIND VCPUS SAMPLES
 *
 * Prints a line for each sample, with a time in us for each vCPU; in a sample all of them are at it
 * at once. Each vCPU has two tasks, which pass it on by futex. A guest that does nothing but leave
 * for user space is timed from one return of KVM_RUN to the next:
 *
 *     exit      the same task calls KVM_RUN again
 *     served    the other task is woken in between, as if it served the exit
 *     thread    the other task, a thread of the same group, calls KVM_RUN
 *     group     the other task, which has a thread group of its own but this memory, calls KVM_RUN
 *     fresh     a vCPU's first KVM_RUN alone
 *
 * A guest that computes is timed by its own TSC, from its last instruction to its next:
 *
 *     kicked    a signal ends KVM_RUN, and the same task calls it again
 *     kicked-thread, kicked-group     and one of the other tasks calls it
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { MAX_VCPUS = 64, STACK = 1 << 16, RAM = 1 << 21, CODE = 0x1000, DATA = 0x2000 };
enum { POLL_US = 5000 };

/* out %al, $0x80; and again */
static const uint8_t leaving[] = {0xe6, 0x80, 0xeb, 0xfc};

/* cmpl $0, [left]; jne 1f; rdtsc; mov %eax, [last]; and again
 * 1: rdtsc; mov %eax, [first]; movl $0, [left]; and again */
static const uint8_t computing[] = {
    0x66, 0x83, 0x3e, 0x00, 0x00, 0x00, 0x75, 0x08, 0x0f, 0x31, 0x66, 0xa3, 0x04, 0x00, 0xeb, 0xf0,
    0x0f, 0x31, 0x66, 0xa3, 0x08, 0x00, 0x66, 0xc7, 0x06, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xeb,
    0xdf,
};

/* What the guest that computes reads and writes. */
struct looks {
    _Atomic uint32_t left; /* whether it was out of KVM_RUN since its last look at the TSC */
    _Atomic uint32_t last, first; /* the low half, before that and after it */
};

enum step { FIRST, NEXT };

struct vcpu {
    int fd, tsc_khz;
    struct kvm_run *run;
    struct looks *looks;
    struct task {
        struct vcpu *vcpu;
        uint32_t number;
        _Atomic pid_t tid;
    } tasks[2];
    _Atomic uint32_t turn; /* the task that has it */
    _Atomic uint32_t asked, done; /* samples, or kicks */
    enum step step;
    uint32_t first; /* the task that had it at the sample's beginning */
    uint32_t last; /* the guest's last look at the TSC */
    double start, time;
};

static struct vcpu vcpus[MAX_VCPUS];
static int count;
static int computes, serves, moves, own_group, fresh;

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e6 + time.tv_nsec / 1e3;
}

static void wait_for(_Atomic uint32_t *word, uint32_t value)
{
    uint32_t seen;
    while ((seen = *word) != value)
        syscall(SYS_futex, word, FUTEX_WAIT, seen, NULL, NULL, 0);
}

static void set(_Atomic uint32_t *word, uint32_t value)
{
    *word = value;
    syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

/* Until the guest leaves, or is kicked. No errno: tasks that are no threads share one. */
static void run(struct vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    if (ioctl(vcpu->fd, KVM_RUN, 0) == 0 ? run->exit_reason != KVM_EXIT_IO : !run->immediate_exit)
        errx(1, "KVM_RUN failed: exit %u", run->exit_reason);
    run->immediate_exit = 0;
}

/* One step of a sample, by the task that has the vCPU. */
static void leave(struct vcpu *vcpu, uint32_t me)
{
    if (vcpu->step == FIRST) {
        wait_for(&vcpu->asked, vcpu->done + 1);
        if (!fresh)
            run(vcpu);
        vcpu->first = me;
        vcpu->step = NEXT;
        vcpu->start = now();
        if (serves || moves)
            set(&vcpu->turn, !me);
    } else if (serves && me != vcpu->first) {
        set(&vcpu->turn, !me);
    } else {
        run(vcpu);
        vcpu->time = now() - vcpu->start;
        vcpu->step = FIRST;
        set(&vcpu->done, vcpu->done + 1);
    }
}

_Noreturn static int work(void *argument)
{
    struct task *task = argument;
    struct vcpu *vcpu = task->vcpu;
    task->tid = syscall(SYS_gettid);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (;;) {
        wait_for(&vcpu->turn, task->number);
        if (!computes) {
            leave(vcpu, task->number);
        } else {
            run(vcpu);
            vcpu->last = vcpu->looks->last;
            vcpu->looks->left = 1;
            vcpu->done++;
            if (moves)
                set(&vcpu->turn, !task->number);
        }
    }
}

_Noreturn static void *work_as_thread(void *task)
{
    work(task);
}

static void start(struct vcpu *vcpu, uint32_t number, int as_thread)
{
    struct task *task = &vcpu->tasks[number];
    *task = (struct task){vcpu, number, 0};
    if (as_thread) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work_as_thread, task))
            errx(1, "no thread");
    } else {
        char *stack = mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (clone(work, stack + STACK, CLONE_VM | SIGCHLD, task) < 0)
            err(1, "clone");
    }
    while (!task->tid)
        usleep(100);
}

/* A VM in which all vCPUs are at the program's beginning. */
static int make_vm(int kvm)
{
    int vm = ioctl(kvm, KVM_CREATE_VM, 0);
    uint8_t *ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    struct kvm_userspace_memory_region region = {.memory_size = RAM, .userspace_addr = (size_t)ram};
    if (vm < 0 || ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000) || ioctl(vm, KVM_CREATE_IRQCHIP, 0) ||
        ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region))
        err(1, "VM");
    if (computes)
        memcpy(ram + CODE, computing, sizeof computing);
    else
        memcpy(ram + CODE, leaving, sizeof leaving);
    int run_size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    for (int number = 0; number < count; number++) {
        struct vcpu *vcpu = &vcpus[number];
        struct kvm_mp_state runnable = {KVM_MP_STATE_RUNNABLE};
        struct kvm_regs regs = {.rip = CODE, .rflags = 2};
        struct kvm_sregs sregs;
        vcpu->fd = ioctl(vm, KVM_CREATE_VCPU, number);
        vcpu->run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
        vcpu->tsc_khz = ioctl(vcpu->fd, KVM_GET_TSC_KHZ, 0);
        vcpu->looks = (struct looks *)(ram + DATA + number * 64);
        if (vcpu->run == MAP_FAILED || ioctl(vcpu->fd, KVM_GET_SREGS, &sregs))
            err(1, "vCPU");
        sregs.cs.base = sregs.cs.selector = 0;
        sregs.ds.base = DATA + number * 64;
        if (ioctl(vcpu->fd, KVM_SET_SREGS, &sregs) || ioctl(vcpu->fd, KVM_SET_REGS, &regs) ||
            ioctl(vcpu->fd, KVM_SET_MP_STATE, &runnable))
            err(1, "vCPU state");
    }
    return vm;
}

static void close_vm(int vm)
{
    for (int number = 0; number < count; number++) {
        munmap(vcpus[number].run, sysconf(_SC_PAGESIZE));
        close(vcpus[number].fd);
    }
    close(vm);
}

static void sample_computing(void)
{
    for (int number = 0; number < count; number++) {
        struct vcpu *vcpu = &vcpus[number];
        uint32_t seen = vcpu->looks->last;
        while (vcpu->looks->last == seen)
            usleep(POLL_US);
    }
    for (int number = 0; number < count; number++) {
        struct vcpu *vcpu = &vcpus[number];
        vcpu->asked = vcpu->done + 1;
        vcpu->run->immediate_exit = 1;
        syscall(SYS_tkill, vcpu->tasks[vcpu->turn].tid, SIGURG);
    }
    for (int number = 0; number < count; number++) {
        struct vcpu *vcpu = &vcpus[number];
        while (vcpu->done != vcpu->asked || vcpu->looks->left)
            usleep(POLL_US);
        vcpu->time = (vcpu->looks->first - vcpu->last) * 1e3 / vcpu->tsc_khz;
    }
}

static void sample_leaving(void)
{
    for (int number = 0; number < count; number++)
        set(&vcpus[number].asked, vcpus[number].asked + 1);
    for (int number = 0; number < count; number++)
        wait_for(&vcpus[number].done, vcpus[number].asked);
}

static void nothing(int signal)
{
    (void)signal;
}

int main(int argc, char **argv)
{
    if (argc != 4)
        errx(2, "move KIND VCPUS SAMPLES");
    const char *kind = argv[1];
    int samples = atoi(argv[3]), kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    count = atoi(argv[2]);
    if (count < 1 || count > MAX_VCPUS)
        errx(2, "1 to %d vCPUs", MAX_VCPUS);
    if (kvm < 0)
        err(1, "/dev/kvm");
    computes = !strncmp(kind, "kicked", 6);
    serves = !strcmp(kind, "served");
    own_group = strstr(kind, "group") != NULL;
    moves = own_group || strstr(kind, "thread") != NULL;
    fresh = !strcmp(kind, "fresh");
    sigaction(SIGURG, &(struct sigaction){.sa_handler = nothing}, NULL);

    int vm = make_vm(kvm);
    for (int number = 0; number < count; number++) {
        start(&vcpus[number], 0, 1);
        start(&vcpus[number], 1, !own_group);
    }
    /* The first is no sample: what it touches has never been touched. */
    for (int sample = 0; sample <= samples; sample++) {
        if (computes) {
            sample_computing();
        } else {
            if (fresh && sample) {
                close_vm(vm);
                vm = make_vm(kvm);
            }
            sample_leaving();
        }
        for (int number = 0; sample && number < count; number++)
            printf("%.1f%c", vcpus[number].time, number < count - 1 ? ' ' : '\n');
        fflush(stdout);
    }
    return 0;
}

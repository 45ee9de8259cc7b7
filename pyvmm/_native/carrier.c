/* A process that executes another program gets a new address space, and its threads end; KVM does
 * nothing for anyone who has not the address space that a VM was made in. A task made by
 * clone(CLONE_VM) in a thread group of its own shares the old one and survives the exec: so the
 * guest runs on in the carrier, one task a vCPU, while the new image starts.
 *
 *   leader     closes what it does not need, starts the tasks, and watches the process: when that
 *              dies before it has taken the guest over, it starts the old program in its place
 *   a task     waits for its vCPU, enters KVM_RUN, and leaves an exit that needs user space where
 *              it is, until the next image asks for the vCPU's state
 *
 * docs/carrier.md tells what it rests on. Here are raw system calls only (raw.h). */
#include "carrier.h"

#include <linux/fcntl.h>
#include <linux/kvm.h>
#include <linux/poll.h>
#include <linux/prctl.h>
#include <linux/resource.h>
#include <linux/signal.h>
#include <linux/time.h>
#include <linux/wait.h>

#include "raw.h"

enum {
	COMMAND_BITS = 3,
	COMMAND_MASK = (1 << COMMAND_BITS) - 1,
	COUNT_BITS = 16,
	MAX_ATTEMPTS = 3,
	SPAWN_TRIES = 100,
};
static const int64_t LOOK_NS = SECOND_NS, SPAWN_PAUSE_NS = SECOND_NS / 10;

static void say(const char *text)
{
	size_t size = 0;
	struct pollfd err = { .fd = 2, .events = POLLOUT };

	while (text[size])
		size++;
	/* Nobody is waited for. */
	if (raw_syscall(__NR_poll, (long)&err, 1, 0, 0, 0) == 1)
		raw_syscall(__NR_write, 2, (long)text, size, 0, 0);
}

static void end(int code)
{
	raw_syscall(__NR_exit_group, code, 0, 0, 0, 0);
	__builtin_unreachable();
}

/* The guest is elsewhere. What is left here takes long to take apart if the guest has much memory:
 * no peer waits for its end of file that long, and no vCPU for the processor. The last task to end
 * does it, which is the leader or, in a moment, this one. */
static void leave(const struct pyvmm_control *control)
{
	raw_syscall(__NR_close_range, 0, ~0U, 0, 0, 0);
	raw_syscall(__NR_setpriority, PRIO_PROCESS, control->pid, 19, 0, 0);
	raw_syscall(__NR_setpriority, PRIO_PROCESS, 0, 19, 0, 0);
	end(0);
}

static struct pyvmm_slot *slot_of(struct pyvmm_control *control, uint32_t index)
{
	return (void *)((char *)control + control->slots_at + (size_t)index * control->slot_size);
}

/* ---- a vCPU's task ---------------------------------------------------------------------- */

/* A task is found by its stack, which begins with it: also by the kick, which interrupts it. */
static struct pyvmm_carrier_task *own_task(const void *place)
{
	return *(struct pyvmm_carrier_task **)((uintptr_t)place & -(uintptr_t)PYVMM_STACK_SIZE);
}

/* KVM looks at the flag when KVM_RUN begins: a kick between a look at the command and KVM_RUN is
 * not lost. */
static void handle_kick(int number)
{
	struct pyvmm_carrier_task *task = own_task(&number);

	if (task)
		task->run->immediate_exit = 1;
}

__attribute__((naked)) static void return_from_signal(void)
{
	__asm__("mov $15, %eax\n\tsyscall"); /* rt_sigreturn */
}

static void kick(struct pyvmm_control *control, int number)
{
	for (uint32_t i = 0; i < control->cpu_count; i++)
		raw_syscall(__NR_tgkill, control->pid, slot_of(control, i)->tid, number, 0, 0);
}

/* Give all tasks a command: its number. From either image, and from the leader; one at a time. */
int pyvmm_command(struct pyvmm_control *control, uint32_t command, int kick_signal)
{
	uint32_t number = (load_word(&control->command) >> COMMAND_BITS) + 1;

	store_word(&control->command, number << COMMAND_BITS | command);
	wake_word(&control->command);
	kick(control, kick_signal);
	return (int)(number & (~0U >> COMMAND_BITS));
}

/* Note the write that an exit is, if it is one: whether there was room for it. */
static int note_write(struct pyvmm_slot *slot, const struct pyvmm_run *run)
{
	struct pyvmm_write *write = &slot->writes[slot->write_count];
	const uint8_t *from;
	uint8_t *to = write->data;
	uint32_t size;

	if (slot->write_count == PYVMM_MAX_WRITES)
		return 0;
	if (run->exit_reason == KVM_EXIT_IO) {
		const struct pyvmm_run_io *io = &run->exit.io;

		from = (const uint8_t *)run + io->data_offset;
		write->is_port = 1;
		write->address = io->port;
		write->size = io->size;
		write->count = io->count;
		size = io->size * io->count;
		/* All that one instruction writes to a port is one exit. */
		if (size > PYVMM_MAX_PORT_DATA)
			return 0;
		if (size > sizeof(write->data))
			to = slot->port_data;
	} else {
		from = run->exit.mmio.data;
		write->is_port = 0;
		write->address = run->exit.mmio.phys_addr;
		write->size = size = run->exit.mmio.len;
		write->count = 1;
		if (size > sizeof(write->data))
			return 0;
	}
	for (uint32_t i = 0; i < size; i++)
		to[i] = from[i];
	slot->write_count++;
	return 1;
}

static int is_write(const struct pyvmm_run *run)
{
	return run->exit_reason == KVM_EXIT_IO ? run->exit.io.direction == KVM_EXIT_IO_OUT :
						 run->exit.mmio.is_write;
}

static void note_exit(struct pyvmm_slot *slot, const struct pyvmm_run *run)
{
	for (size_t i = 0; i < PYVMM_EXIT_SIZE; i++)
		slot->exit[i] = ((const uint8_t *)run)[i];
	slot->has_exit = 1;
}

/* Have no access half done. What an instruction writes is past by the time of its exit, and KVM
 * tells of the rest of it as further exits, until it comes back with EINTR: all of it is noted. What
 * an instruction reads it has not got yet, and its registers are those that it began with: the vCPU
 * that gets them repeats it. */
static void make_whole(struct pyvmm_carrier_task *task)
{
	struct pyvmm_slot *slot = task->slot;
	struct pyvmm_run *run = task->run;

	while (slot->is_parked) {
		if (slot->result)
			return; /* KVM could not enter the guest; the next vCPU will find that, too */
		if (run->exit_reason != KVM_EXIT_IO && run->exit_reason != KVM_EXIT_MMIO) {
			note_exit(slot, run);
			return;
		}
		if (!is_write(run))
			return;
		if (!note_write(slot, run)) {
			slot->save_result = -E2BIG;
			return;
		}
		run->immediate_exit = 1;
		slot->result = raw_ioctl(task->vcpu_fd, KVM_RUN, 0);
		slot->is_parked = slot->result != -EINTR;
	}
}

/* Count the tasks that have stopped for a command. Those of an earlier one, if somebody gave up
 * waiting, do not count. */
static void count_stopped(uint32_t *stopped, uint32_t number)
{
	uint32_t own = number << COUNT_BITS, old, new;

	do {
		old = load_word(stopped);
		new = (old >> COUNT_BITS == own >> COUNT_BITS ? old : own) + 1;
	} while (!change_word(stopped, old, new));
	wake_word(stopped);
}

/* Wait until all have: whether they did, or there is another command. */
static int wait_stopped(struct pyvmm_control *control, uint32_t command)
{
	uint32_t all = (command >> COMMAND_BITS) << COUNT_BITS | control->cpu_count, stopped;

	while ((stopped = load_word(&control->stopped)) != all) {
		if (load_word(&control->command) != command)
			return 0;
		wait_word(&control->stopped, stopped, LOOK_NS);
	}
	return 1;
}

/* KVM lets an eventfd raise interrupts in one VM at a time: the next image's VM takes them. What
 * is signalled in between waits in the eventfd. */
static int give_irqfds(const struct pyvmm_carrier *carrier, int given)
{
	int result = 0;

	for (size_t i = 0; i < carrier->irqfd_count && !result; i++) {
		struct kvm_irqfd irqfd = carrier->irqfds[i];

		if (given)
			irqfd.flags |= KVM_IRQFD_FLAG_DEASSIGN;
		result = raw_ioctl(carrier->vm_fd, KVM_IRQFD, &irqfd);
	}
	return result;
}

static void stop_and_save(struct pyvmm_carrier_task *task, uint32_t command)
{
	struct pyvmm_slot *slot = task->slot;
	struct pyvmm_control *control = task->carrier->control;
	uint32_t number = command >> COMMAND_BITS;
	int is_first = task == task->carrier->tasks;

	slot->stopped_at = raw_clock(CLOCK_MONOTONIC);
	slot->save_result = 0;
	make_whole(task);
	if (is_first && !slot->save_result) {
		/* Before any LAPIC is read: what they have delivered by then is in its state. */
		slot->error.request = KVM_IRQFD;
		slot->save_result = give_irqfds(task->carrier, 1);
		task->has_given = 1;
	}
	count_stopped(&control->stopped, number);
	/* A vCPU that still runs may send an interrupt to one that has been read. */
	if (!wait_stopped(control, command))
		return;
	if (!slot->save_result)
		slot->save_result = pyvmm_save_cpu(task->vcpu_fd, &slot->state,
						   (char *)slot + control->xsave_at,
						   control->has_xsave2, &control->msrs, &slot->error);
	if (is_first && !slot->save_result)
		slot->save_result = pyvmm_save_vm(task->carrier->vm_fd, &control->vm, &slot->error);
	store_word(&slot->saved, number);
	wake_word(&slot->saved);
}

/* The interpreter of commands, and the loop around KVM_RUN. */
static void run_task(void *argument)
{
	struct pyvmm_carrier_task *task = argument;
	struct pyvmm_control *control = task->carrier->control;
	struct pyvmm_slot *slot = task->slot;
	struct pyvmm_run *run = task->run;
	uint32_t done = 0; /* the command that was carried out */

	slot->tid = (int32_t)raw_syscall(__NR_gettid, 0, 0, 0, 0, 0);
	__atomic_fetch_add(&control->ready, 1, __ATOMIC_SEQ_CST);
	wake_word(&control->ready);
	for (;;) {
		uint32_t owner = load_word(&slot->owner), command;

		if (owner == PYVMM_OLD || owner == PYVMM_KEPT) {
			/* A kick ends the wait, too. */
			if ((load_word(&control->command) & COMMAND_MASK) == PYVMM_END)
				leave(control);
			wait_word(&slot->owner, owner, 0);
			continue;
		}
		/* The flag first: a kick that comes after sets it again. */
		run->immediate_exit = 0;
		command = load_word(&control->command);
		switch (command & COMMAND_MASK) {
		case PYVMM_RUN:
			/* The image that asked for them did not take them. */
			if (task->has_given) {
				give_irqfds(task->carrier, 0);
				task->has_given = 0;
			}
			/* Writes that no image has done yet come before all that follows them. */
			if (!slot->is_parked && !slot->write_count) {
				if (!slot->entered)
					run->immediate_exit = 1; /* the move takes its time in KVM_RUN */
				slot->result = raw_ioctl(task->vcpu_fd, KVM_RUN, 0);
				if (!slot->entered)
					slot->entered = raw_clock(CLOCK_MONOTONIC);
				if (slot->result == -EINTR || slot->result == -EAGAIN ||
				    (!slot->result &&
				     (run->exit_reason == KVM_EXIT_INTR ||
				      run->exit_reason == KVM_EXIT_IRQ_WINDOW_OPEN)))
					continue;
				slot->parked_at = raw_clock(CLOCK_MONOTONIC);
				slot->is_parked = 1;
			}
			break;
		case PYVMM_TAKE:
			if (done != command)
				stop_and_save(task, command);
			break;
		case PYVMM_BACK:
			slot->result = slot->is_parked ? slot->result : -EINTR;
			slot->is_parked = 0;
			slot->entered = 0;
			store_word(&slot->owner, PYVMM_OLD);
			wake_word(&slot->owner);
			continue;
		case PYVMM_END:
			leave(control);
		}
		done = command;
		wait_word(&control->command, command, 0);
	}
}

/* ---- the leader ------------------------------------------------------------------------- */

/* A descriptor left open here would delay a peer's end of file. */
static void close_others(const int *keep, size_t count)
{
	unsigned int from = 0;

	for (size_t i = 0; i < count; i++) {
		if ((unsigned int)keep[i] > from)
			raw_syscall(__NR_close_range, from, keep[i] - 1, 0, 0, 0);
		from = keep[i] + 1;
	}
	raw_syscall(__NR_close_range, from, ~0U, 0, 0, 0);
}

static char *stack_of(struct pyvmm_carrier *carrier, size_t index,
		      struct pyvmm_carrier_task *task)
{
	char *stack = carrier->stacks + index * PYVMM_STACK_SIZE;

	*(struct pyvmm_carrier_task **)stack = task;
	return stack + PYVMM_STACK_SIZE;
}

static void start_tasks(struct pyvmm_carrier *carrier)
{
	const long flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD |
			   CLONE_SYSVSEM;
	struct {
		void (*handler)(int);
		unsigned long flags;
		void (*restorer)(void);
		uint64_t mask;
	} action = { handle_kick, SA_RESTORER, return_from_signal, ~0ULL };
	uint64_t kicks = 1ULL << (carrier->kick_signal - 1);
	uint32_t count = carrier->control->cpu_count;

	raw_syscall(__NR_rt_sigaction, carrier->kick_signal, (long)&action, 0, sizeof(uint64_t), 0);
	raw_syscall(__NR_rt_sigprocmask, SIG_UNBLOCK, (long)&kicks, 0, sizeof(kicks), 0);
	for (uint32_t i = 0; i < count; i++) {
		struct pyvmm_carrier_task *task = &carrier->tasks[i];
		long tid = start_task(flags, run_task, task, stack_of(carrier, i, task));

		if (tid < 0) {
			carrier->control->error = (int32_t)tid;
			store_word(&carrier->control->ready, ~0U);
			wake_word(&carrier->control->ready);
			end(1);
		}
	}
}

/* Wait for a process to end: whether it did. */
static int wait_end(int process_fd, int64_t timeout_ns)
{
	struct pollfd look = { .fd = process_fd, .events = POLLIN };
	struct __kernel_timespec timeout = { timeout_ns / SECOND_NS, timeout_ns % SECOND_NS };

	return raw_syscall(__NR_ppoll, (long)&look, 1, (long)&timeout, 0, 0) == 1;
}

struct program {
	struct pyvmm_carrier *carrier;
	char *const *environment;
};

/* In a child that shares the memory until the exec. */
static void execute(void *argument)
{
	const struct program *program = argument;
	struct pyvmm_carrier *carrier = program->carrier;
	static const char this[] = "";

	for (size_t i = 0; i < carrier->handed_count; i++)
		raw_syscall(__NR_fcntl, carrier->handed_fds[i], F_SETFD, 0, 0, 0);
	raw_syscall(__NR_rt_sigprocmask, SIG_SETMASK, (long)&carrier->signal_mask, 0,
		    sizeof(uint64_t), 0);
	raw_syscall(__NR_execveat, carrier->program_fd, (long)this, (long)carrier->command,
		    (long)program->environment, AT_EMPTY_PATH);
	raw_syscall(__NR_exit, 127, 0, 0, 0, 0);
}

/* Start the old program, which takes over from here as any image does: a pidfd of it, or the
 * negative error number. */
static int start_old(struct pyvmm_carrier *carrier, char *const *environment)
{
	struct program program = { carrier, environment };
	char *stack = stack_of(carrier, carrier->control->cpu_count, NULL);
	long pid = start_task(CLONE_VM | CLONE_VFORK | SIGCHLD, execute, &program, stack);

	return pid < 0 ? (int)pid : (int)raw_syscall(__NR_pidfd_open, pid, 0, 0, 0, 0);
}

/* The image that was to take over is gone. */
static void go_back(struct pyvmm_carrier *carrier, char *const *environment)
{
	struct pyvmm_control *control = carrier->control;

	if (control->attempts++ == MAX_ATTEMPTS) {
		say("pyvmm: no image takes the guest over: it is lost\n");
		end(1);
	}
	/* Should it have stopped the vCPUs: they run on until the next one is there. */
	pyvmm_command(control, control->first_command, carrier->kick_signal);
	control->deadline = raw_clock(CLOCK_MONOTONIC) + carrier->patience;
	store_word(&control->phase, PYVMM_CROSSING);
	raw_syscall(__NR_close, carrier->process_fd, 0, 0, 0, 0);
	/* A host that is short of memory for a moment does not cost the guest. */
	for (int i = 0; i < SPAWN_TRIES; i++) {
		struct __kernel_timespec pause = { 0, SPAWN_PAUSE_NS };

		carrier->process_fd = start_old(carrier, environment);
		if (carrier->process_fd >= 0)
			return;
		raw_syscall(__NR_nanosleep, (long)&pause, 0, 0, 0, 0);
	}
	say("pyvmm: the image before cannot be started: the guest is lost\n");
	end(1);
}

static void watch(struct pyvmm_carrier *carrier)
{
	struct pyvmm_control *control = carrier->control;

	for (;;) {
		uint32_t phase = load_word(&control->phase);
		int64_t left = LOOK_NS;
		int is_over;

		if (phase == PYVMM_CROSSING) {
			left = (int64_t)control->deadline - raw_clock(CLOCK_MONOTONIC);
			left = left < 0 ? 0 : left < LOOK_NS ? left : LOOK_NS;
		}
		is_over = wait_end(carrier->process_fd, left);
		phase = load_word(&control->phase);
		if (is_over) {
			/* Before the exec, and after the takeover, the guest ends with its process. */
			if (phase != PYVMM_CROSSING)
				end(0);
			go_back(carrier, carrier->died_environment);
		} else if (phase == PYVMM_CROSSING &&
			   raw_clock(CLOCK_MONOTONIC) >= (int64_t)control->deadline &&
			   /* Either it takes the guest over, or it is killed. */
			   change_word(&control->phase, PYVMM_CROSSING, PYVMM_LATE)) {
			raw_syscall(__NR_pidfd_send_signal, carrier->process_fd, SIGKILL, 0, 0, 0);
			while (!wait_end(carrier->process_fd, LOOK_NS))
				;
			go_back(carrier, carrier->late_environment);
		}
	}
}

static void lead(void *argument)
{
	struct pyvmm_carrier *carrier = argument;
	struct pyvmm_control *control = carrier->control;

	raw_syscall(__NR_prctl, PR_SET_NAME, (long)"pyvmm-carrier", 0, 0, 0);
	control->pid = (int32_t)raw_syscall(__NR_getpid, 0, 0, 0, 0, 0);
	close_others(carrier->keep_fds, carrier->keep_count);
	start_tasks(carrier);
	__atomic_fetch_add(&control->ready, 1, __ATOMIC_SEQ_CST);
	wake_word(&control->ready);
	watch(carrier);
}

/* Start a carrier, whose tasks wait for their vCPUs: its process id, or the negative error number.
 * What *carrier names stays as it is until it has ended. It takes no signals but the kick, sends
 * none when it ends, and is reaped with __WALL. */
int pyvmm_start_carrier(struct pyvmm_carrier *carrier)
{
	uint64_t all = ~0ULL, old;
	char *stack = stack_of(carrier, carrier->control->cpu_count + 1, NULL);
	long pid;

	raw_syscall(__NR_rt_sigprocmask, SIG_SETMASK, (long)&all, (long)&old, sizeof(all), 0);
	pid = start_task(CLONE_VM, lead, carrier, stack);
	raw_syscall(__NR_rt_sigprocmask, SIG_SETMASK, (long)&old, 0, sizeof(old), 0);
	return (int)pid;
}

/* Wait until all of a carrier's tasks are there: 0, or the negative error number. */
int pyvmm_wait_ready(struct pyvmm_control *control, int64_t timeout_ns)
{
	int64_t end = raw_clock(CLOCK_MONOTONIC) + timeout_ns, left;
	uint32_t ready;

	while ((ready = load_word(&control->ready)) != control->cpu_count + 1) {
		if (ready == ~0U)
			return control->error;
		left = end - raw_clock(CLOCK_MONOTONIC);
		if (left <= 0)
			return -ETIMEDOUT;
		wait_word(&control->ready, ready, left);
	}
	return 0;
}

#include "takeover.h"

#include <linux/time.h>

#include "raw.h"

static const int64_t LOOK_NS = 20000000;
/* How long, at most, the vCPUs' threads are waited for on their way into the guest, and how often. */
enum { ENTRY_NS = 5000000, ENTRY_LOOK_NS = 20000 };

static struct pyvmm_slot *slot_of(struct pyvmm_control *control, uint32_t index)
{
	return (void *)((char *)control + control->slots_at + (size_t)index * control->slot_size);
}

/* Wait until a vCPU's state is written down: 0, or the negative error number; ESRCH if there is no
 * carrier any more. */
static int wait_saved(struct pyvmm_control *control, const struct pyvmm_slot *slot, uint32_t number,
		      int64_t spin, int64_t deadline)
{
	uint32_t saved;

	while ((saved = load_word(&slot->saved)) != number) {
		int64_t now = raw_clock(CLOCK_MONOTONIC);

		if (now < spin) {
			__builtin_ia32_pause();
			continue;
		}
		if (raw_syscall(__NR_tgkill, control->pid, slot->tid, 0, 0, 0) < 0)
			return -ESRCH;
		if (now >= deadline)
			return -ETIMEDOUT;
		wait_word(&slot->saved, saved, LOOK_NS);
	}
	return slot->save_result;
}

/* Give the vCPUs, none of which has run yet, and their VM the state of those in the carrier, and let
 * the threads go that wait for them (pyvmm_run): 0, or the negative error number. ESRCH: there is no
 * carrier any more. ECANCELED: the carrier has given this image up. After an error the guest
 * is the carrier's. */
int pyvmm_take_over(struct pyvmm_takeover *takeover)
{
	struct pyvmm_control *control = takeover->control;
	struct pyvmm_state_error *error = &takeover->error;
	const struct __kernel_timespec look = { 0, ENTRY_LOOK_NS };
	int64_t deadline;
	uint32_t number;
	int result = 0;

	control->asked_at = raw_clock(CLOCK_MONOTONIC);
	deadline = control->asked_at + takeover->patience;
	number = pyvmm_command(control, PYVMM_TAKE, takeover->kick_signal);
	/* Each as soon as it is there: nobody reads the carrier's any more by then. */
	for (uint32_t i = 0; i < control->cpu_count && !result; i++) {
		struct pyvmm_slot *slot = slot_of(control, i);

		error->cpu = i;
		result = wait_saved(control, slot, number, control->asked_at + takeover->spin, deadline);
		if (result) {
			*error = slot->error;
			error->cpu = i;
			break;
		}
		if (!i)
			control->saved_at = raw_clock(CLOCK_MONOTONIC);
		result = pyvmm_load_cpu(takeover->vcpu_fds[i], &slot->state,
					(char *)slot + control->xsave_at, takeover->event_flags, error);
	}
	if (!result)
		result = pyvmm_load_vm(takeover->vm_fd, &control->vm, error);
	control->loaded_at = raw_clock(CLOCK_MONOTONIC);
	if (!result && !change_word(&control->phase, PYVMM_CROSSING, PYVMM_TAKEN))
		result = -ECANCELED;
	if (result) {
		if (result != -ESRCH)
			pyvmm_command(control, control->first_command, takeover->kick_signal);
		return result;
	}
	for (uint32_t i = 0; i < control->cpu_count; i++) {
		struct pyvmm_slot *slot = slot_of(control, i);

		store_word(&slot->owner, PYVMM_NEW);
		wake_word(&slot->owner);
	}
	control->taken_at = raw_clock(CLOCK_MONOTONIC);
	/* This processor is theirs first: a thread that was woken here waits for the caller's turn to
	 * end, which has much to do now. */
	for (uint32_t i = 0; takeover->is_running && i < control->cpu_count; i++)
		while (!*(volatile uint64_t *)&slot_of(control, i)->run_at &&
		       raw_clock(CLOCK_MONOTONIC) - (int64_t)control->taken_at < ENTRY_NS)
			raw_syscall(__NR_nanosleep, (long)&look, 0, 0, 0, 0);
	return 0;
}

#include "state.h"

#include <linux/kvm.h>
#include <linux/time.h>

#include "raw.h"

enum {
	CR4_PAE = 1 << 5,
	EFER_LMA = 1 << 10,
	MSR_TSC_DEADLINE = 0x6E0,
	/* The last branches taken, which some kernels let nobody write: a loss that no program can
	 * tell from another branch. */
	MSR_FIRST_BRANCH = 0x1DB,
	MSR_LAST_BRANCH = 0x1DE,
	MSRS_A_CALL = 255, /* KVM refuses MAX_IO_MSRS, which is 256 */
	PIT_GSI = 0,
	PIT_HZ = 1193182,
	PIT_LONGEST_NS = 60000000, /* to count to 65536 */
	CLOCK_READS = 3,
	/* How close kvmclock comes to where it was, and how often that is tried. */
	CLOCK_PRECISION_NS = 200,
	CLOCK_TRIES = 5,
};
/* KVM_X86_REG_KVM(KVM_REG_GUEST_SSP): the shadow stack pointer (Linux 6.18). */
static const uint64_t CR0_PG = 1UL << 31;
static const uint64_t REG_GUEST_SSP = 0x2030000300000000;

#define FAIL(result, what)                      \
	do {                                    \
		error->request = (what);        \
		return (result);                \
	} while (0)
#define TRY(fd, what, argument)                                     \
	do {                                                        \
		int tried = raw_ioctl((fd), (what), (argument));    \
		if (tried < 0)                                      \
			FAIL(tried, (what));                        \
	} while (0)

struct msr_call {
	uint32_t count, pad;
	struct pyvmm_msr entries[MSRS_A_CALL];
};

static int access_tsc_offset(int fd, unsigned long request, uint64_t *offset)
{
	struct kvm_device_attr attr = {
		.group = KVM_VCPU_TSC_CTRL, .attr = KVM_VCPU_TSC_OFFSET, .addr = (uintptr_t)offset
	};

	return raw_ioctl(fd, request, &attr);
}

static int access_ssp(int fd, unsigned long request, uint64_t *ssp)
{
	struct kvm_one_reg reg = { .id = REG_GUEST_SSP, .addr = (uintptr_t)ssp };

	return raw_ioctl(fd, request, &reg);
}

static int save_msrs(int fd, struct pyvmm_cpu_state *state, const struct pyvmm_msr_list *list)
{
	struct msr_call call;

	call.pad = 0;
	state->msr_count = 0;
	state->tsc_deadline = 0;
	for (uint32_t at = 0; at < list->count;) {
		uint32_t count = list->count - at < MSRS_A_CALL ? list->count - at : MSRS_A_CALL;
		int done;

		for (uint32_t i = 0; i < count; i++) {
			call.entries[i].index = list->indices[at + i];
			call.entries[i].reserved = 0;
			call.entries[i].data = 0;
		}
		call.count = count;
		done = raw_ioctl(fd, KVM_GET_MSRS, &call);
		if (done < 0)
			return done;
		for (uint32_t i = 0; i < (uint32_t)done; i++) {
			if (call.entries[i].index == MSR_TSC_DEADLINE)
				state->tsc_deadline = call.entries[i].data;
			else if (call.entries[i].data || at + i < list->sparse_from)
				state->msrs[state->msr_count++] = call.entries[i];
		}
		/* KVM stops at a register that this vCPU lacks. */
		at += (uint32_t)done < count ? (uint32_t)done + 1 : count;
	}
	return 0;
}

/* Read the state of a vCPU that is not in KVM_RUN, with no access half done: 0, or the negative
 * error number. */
int pyvmm_save_cpu(int fd, struct pyvmm_cpu_state *state, void *xsave, int has_xsave2,
		   const struct pyvmm_msr_list *list, struct pyvmm_state_error *error)
{
	uint64_t word;
	int result;

	/* First: reading it delivers a pending INIT or SIPI, which changes CS, RIP and the LAPIC. */
	TRY(fd, KVM_GET_MP_STATE, &state->mp_state);
	TRY(fd, KVM_GET_REGS, &state->regs);
	TRY(fd, KVM_GET_SREGS, &state->sregs);
	state->has_pdptrs = 0;
	if (state->sregs.cr0 & CR0_PG && state->sregs.cr4 & CR4_PAE &&
	    !(state->sregs.efer & EFER_LMA)) {
		struct kvm_sregs2 sregs2;

		if (!raw_ioctl(fd, KVM_GET_SREGS2, &sregs2) &&
		    sregs2.flags & KVM_SREGS2_FLAGS_PDPTRS_VALID) {
			state->has_pdptrs = 1;
			for (int i = 0; i < 4; i++)
				state->pdptrs[i] = sregs2.pdptrs[i];
		}
	}
	TRY(fd, has_xsave2 ? KVM_GET_XSAVE2 : KVM_GET_XSAVE, xsave);
	TRY(fd, KVM_GET_XCRS, &state->xcrs);
	TRY(fd, KVM_GET_DEBUGREGS, &state->debugregs);
	TRY(fd, KVM_GET_LAPIC, &state->lapic);
	result = save_msrs(fd, state, list);
	if (result < 0)
		FAIL(result, KVM_GET_MSRS);
	/* Last of the registers: the calls above may move an event from one place to another. */
	TRY(fd, KVM_GET_VCPU_EVENTS, &state->events);
	state->has_tsc_offset = !access_tsc_offset(fd, KVM_GET_DEVICE_ATTR, &word);
	state->tsc_offset = state->has_tsc_offset ? word : 0;
	state->has_ssp = !access_ssp(fd, KVM_GET_ONE_REG, &word);
	state->ssp = state->has_ssp ? word : 0;
	return 0;
}

static int is_as_wanted(int fd, const struct pyvmm_msr *wanted)
{
	struct {
		uint32_t count, pad;
		struct pyvmm_msr entry;
	} call = { .count = 1, .entry.index = wanted->index };

	return (wanted->index >= MSR_FIRST_BRANCH && wanted->index <= MSR_LAST_BRANCH) ||
	       (raw_ioctl(fd, KVM_GET_MSRS, &call) == 1 && call.entry.data == wanted->data);
}

static int load_msrs(int fd, const struct pyvmm_msr *msrs, uint32_t total,
		     struct pyvmm_state_error *error)
{
	struct msr_call call;

	call.pad = 0;
	for (uint32_t at = 0; at < total;) {
		uint32_t count = total - at < MSRS_A_CALL ? total - at : MSRS_A_CALL;
		int done;

		for (uint32_t i = 0; i < count; i++)
			call.entries[i] = msrs[at + i];
		call.count = count;
		done = raw_ioctl(fd, KVM_SET_MSRS, &call);
		if (done < 0)
			return done;
		at += done;
		/* Those before the first refused one are set. Some are read-only: they are as they
		 * should be, or the state is impossible here. */
		if ((uint32_t)done < count) {
			if (!is_as_wanted(fd, &msrs[at])) {
				error->msr = msrs[at].index;
				return -EINVAL;
			}
			at++;
		}
	}
	return 0;
}

/* Give a vCPU that has not run yet, and has the same CPUID, a state: 0, or the negative error
 * number. event_flags are those that its VM has (kvm/vm.py). */
int pyvmm_load_cpu(int fd, struct pyvmm_cpu_state *state, const void *xsave, uint32_t event_flags,
		   struct pyvmm_state_error *error)
{
	const uint32_t optional =
		KVM_VCPUEVENT_VALID_PAYLOAD | KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
	struct kvm_vcpu_events *events = &state->events;
	int result;

	TRY(fd, KVM_SET_REGS, &state->regs);
	/* Before the LAPIC: APIC_BASE selects xAPIC or x2APIC. */
	if (state->has_pdptrs) {
		/* KVM_SET_SREGS would read the four pointers from guest memory, which by now may hold
		 * others than the CPU has loaded. The two structures begin alike; what follows
		 * differs: the bitmap of the interrupt that is being injected the events give. */
		union {
			struct kvm_sregs old;
			struct kvm_sregs2 new;
		} both;

		both.old = state->sregs;
		both.new.flags = KVM_SREGS2_FLAGS_PDPTRS_VALID;
		for (int i = 0; i < 4; i++)
			both.new.pdptrs[i] = state->pdptrs[i];
		TRY(fd, KVM_SET_SREGS2, &both.new);
	} else {
		TRY(fd, KVM_SET_SREGS, &state->sregs);
	}
	TRY(fd, KVM_SET_XCRS, &state->xcrs);
	TRY(fd, KVM_SET_XSAVE, xsave);
	TRY(fd, KVM_SET_DEBUGREGS, &state->debugregs);
	TRY(fd, KVM_SET_LAPIC, &state->lapic);
	/* The offset is exact; writing the TSC itself would stop it for the pause's length and have
	 * KVM guess whether the vCPUs' TSCs were meant to be equal. */
	if (state->has_tsc_offset) {
		result = access_tsc_offset(fd, KVM_SET_DEVICE_ATTR, &state->tsc_offset);
		if (result < 0)
			FAIL(result, KVM_SET_DEVICE_ATTR);
	}
	result = load_msrs(fd, state->msrs, state->msr_count, error);
	if (result < 0)
		FAIL(result, KVM_SET_MSRS);
	if (state->tsc_deadline) {
		/* KVM drops it in silence unless the LAPIC is in deadline mode already, and compares it
		 * with the TSC. */
		struct pyvmm_msr deadline = { MSR_TSC_DEADLINE, 0, state->tsc_deadline };

		load_msrs(fd, &deadline, 1, error);
	}
	if (state->has_ssp) {
		result = access_ssp(fd, KVM_SET_ONE_REG, &state->ssp);
		if (result < 0)
			FAIL(result, KVM_SET_ONE_REG);
	}
	/* After SREGS, which makes a CPU in its reset state runnable. After REGS, which drops
	 * pending exceptions. Events are the last word on the interrupt being injected. */
	TRY(fd, KVM_SET_MP_STATE, &state->mp_state);
	events->flags &= ~(optional & ~event_flags);
	events->flags |= KVM_VCPUEVENT_VALID_NMI_PENDING;
	if (state->mp_state.mp_state == KVM_MP_STATE_SIPI_RECEIVED)
		events->flags |= KVM_VCPUEVENT_VALID_SIPI_VECTOR;
	else
		events->flags &= ~KVM_VCPUEVENT_VALID_SIPI_VECTOR;
	TRY(fd, KVM_SET_VCPU_EVENTS, events);
	return 0;
}

/* Both clocks at the same moment: of a few tries the one that took the least time. */
static int read_clocks(int fd, uint64_t *clock, uint64_t *boottime)
{
	int64_t best = INT64_MAX;

	for (int i = 0; i < CLOCK_READS; i++) {
		struct kvm_clock_data data = { 0 };
		int64_t before = raw_clock(CLOCK_BOOTTIME), after;
		int result = raw_ioctl(fd, KVM_GET_CLOCK, &data);

		if (result < 0)
			return result;
		after = raw_clock(CLOCK_BOOTTIME);
		if (after - before < best) {
			best = after - before;
			*clock = data.clock;
			*boottime = before + (after - before) / 2;
		}
	}
	return 0;
}

/* Read what a VM has beside its vCPUs, which are out of KVM_RUN: 0, or the negative error number. */
int pyvmm_save_vm(int fd, struct pyvmm_vm_state *state, struct pyvmm_state_error *error)
{
	int result;

	TRY(fd, KVM_GET_PIT2, &state->pit);
	for (uint32_t i = 0; i < PYVMM_CHIPS; i++) {
		state->chips[i].chip_id = i;
		TRY(fd, KVM_GET_IRQCHIP, &state->chips[i]);
	}
	result = read_clocks(fd, &state->clock, &state->boottime);
	if (result < 0)
		FAIL(result, KVM_GET_CLOCK);
	return 0;
}

/* Have kvmclock go on at its distance from the host's boot clock. Between reading the one clock and
 * setting the other some time passes, so the result is measured and set again: or each update
 * would shift the guest's clock by microseconds. */
static int load_clock(int fd, const struct pyvmm_vm_state *state)
{
	int64_t distance = (int64_t)(state->clock - state->boottime), correction = 0;

	for (int i = 0; i < CLOCK_TRIES; i++) {
		int64_t wanted = raw_clock(CLOCK_BOOTTIME) + distance - correction, error;
		struct kvm_clock_data data = { .clock = wanted > 0 ? wanted : 0 };
		uint64_t clock = 0, boottime = 0;
		int result = raw_ioctl(fd, KVM_SET_CLOCK, &data);

		if (!result)
			result = read_clocks(fd, &clock, &boottime);
		if (result < 0)
			return result;
		error = (int64_t)(clock - boottime) - distance;
		if (error > -CLOCK_PRECISION_NS && error < CLOCK_PRECISION_NS)
			break;
		correction += error;
	}
	return 0;
}

/* Have what the PIT counts once go on where it is by now: KVM starts a count anew when it is set. One
 * that counts again and again starts anew all the same, since KVM takes no count for the first time
 * alone. Of channel 0 one that has come to its end would raise its interrupt again. */
void pyvmm_age_pit(struct kvm_pit_state2 *pit)
{
	int64_t now = raw_clock(CLOCK_MONOTONIC);

	for (int i = 0; i < 3; i++) {
		struct kvm_pit_channel_state *channel = &pit->channels[i];
		int64_t age = now - channel->count_load_time, past, count = channel->count;

		if (channel->mode != 0 && channel->mode != 1 && channel->mode != 4 && channel->mode != 5)
			continue;
		if (age < 0)
			continue; /* the time of another boot */
		if (age > PIT_LONGEST_NS)
			age = PIT_LONGEST_NS;
		past = age * PIT_HZ / SECOND_NS;
		if (past < count)
			channel->count = (uint32_t)(count - past);
		else if (i)
			channel->count = 1;
	}
}

/* Give a VM that state; the vCPUs have theirs, since an input of the IOAPIC that is pending is
 * delivered to the LAPICs at once. 0, or the negative error number. */
int pyvmm_load_vm(int fd, struct pyvmm_vm_state *state, struct pyvmm_state_error *error)
{
	struct kvm_irq_level low = { .irq = PIT_GSI };
	int result;

	for (uint32_t i = 0; i < PYVMM_CHIPS; i++)
		TRY(fd, KVM_SET_IRQCHIP, &state->chips[i]);
	/* KVM pulses the PIT's line on a thread of its own, so the chips may have been read while it
	 * was high. The next pulse would then be no edge, nobody would handle and acknowledge it, and
	 * KVM, which waits for that, would never pulse again. */
	TRY(fd, KVM_IRQ_LINE, &low);
	pyvmm_age_pit(&state->pit);
	TRY(fd, KVM_SET_PIT2, &state->pit);
	result = load_clock(fd, state);
	if (result < 0)
		FAIL(result, KVM_SET_CLOCK);
	return 0;
}

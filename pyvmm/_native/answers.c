#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "answers.h"

#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "words.h"

/* The registers and bits are those of pyvmm/devices, which has the whole of each device. */
enum { THR = 0, IER = 1, IIR = 2, LSR = 5 };
enum { IER_ERBFI = 1, IER_ETBEI = 2, IER_ELSI = 4, IER_EDSSI = 8, IER_MASK = 15 };
enum {
	IIR_MODEM = 0x00,
	IIR_NONE = 0x01,
	IIR_THR_EMPTY = 0x02,
	IIR_RECEIVED = 0x04,
	IIR_LINE = 0x06,
	IIR_TIMEOUT = 0x0C,
	IIR_FIFO = 0xC0,
};
enum { FCR_ENABLE = 0x01, LCR_DLAB = 0x80, MCR_LOOP = 0x10, MSR_DELTAS = 0x0F };
enum { LSR_DR = 0x01, LSR_EMPTY = 0x60 };
enum { PM_TIMER = 8, PM_TIMER_HZ = 3579545, PM_TIMER_MASK = 0xFFFFFF, NS = 1000000000 };
enum { INTERRUPT_STATUS = 0x60, INTERRUPT_ACK = 0x64, CONFIG_GENERATION = 0xFC, CONFIG = 0x100 };

/* One access, of up to 8 bytes, lowest first. */
struct access {
	uint64_t offset;
	uint32_t size;
	int is_write;
	uint8_t *data;
};

/* ---- output and interrupts ------------------------------------------------------------------ */

/* Whether one byte more may be promised to the guest as sent. Python adds at most a FIFO's content
 * when the chardev turns out to take none. */
static int has_room(const struct pyvmm_output *output)
{
	return output->event_fd >= 0 &&
	       output->tail - output->head < PYVMM_OUTPUT_SIZE - PYVMM_FIFO_DEPTH;
}

static void put(struct pyvmm_output *output, uint8_t byte)
{
	uint64_t one = 1;

	output->bytes[output->tail++ % PYVMM_OUTPUT_SIZE] = byte;
	if (output->is_awaited) {
		/* An eventfd that is full wakes the writer all the same. */
		if (write(output->event_fd, &one, sizeof(one)) < 0) {
		}
		output->is_awaited = 0;
	}
}

static void set_level(struct pyvmm_line *line, uint32_t level)
{
	struct kvm_irq_level request = { .irq = line->gsi, .level = level };

	if (level == line->level)
		return;
	line->level = level;
	/* KVM refuses neither a GSI that exists nor a level. */
	if (line->vm_fd >= 0)
		ioctl(line->vm_fd, KVM_IRQ_LINE, &request);
}

/* ---- 16550A --------------------------------------------------------------------------------- */

/* The interrupt that IIR shows, by the data sheet's priorities. */
static uint8_t uart_cause(const struct pyvmm_uart *uart)
{
	static const uint8_t triggers[] = { 1, 4, 8, 14 };

	if (uart->ier & IER_ELSI && uart->line_errors)
		return IIR_LINE;
	if (uart->ier & IER_ERBFI && uart->received_count) {
		uint8_t trigger = uart->fcr & FCR_ENABLE ? triggers[uart->fcr >> 6] : 1;

		return uart->received_count >= trigger ? IIR_RECEIVED : IIR_TIMEOUT;
	}
	if (uart->ier & IER_ETBEI && uart->thr_ipending)
		return IIR_THR_EMPTY;
	if (uart->ier & IER_EDSSI && uart->msr & MSR_DELTAS)
		return IIR_MODEM;
	return IIR_NONE;
}

static void uart_update(struct pyvmm_uart *uart)
{
	set_level(uart->line, uart_cause(uart) != IIR_NONE);
}

static int uart_read(struct pyvmm_uart *uart, struct access *access)
{
	uint8_t cause;

	switch (access->offset) {
	case IIR:
		cause = uart_cause(uart);
		*access->data = cause | (uart->fcr & FCR_ENABLE ? IIR_FIFO : 0);
		if (cause == IIR_THR_EMPTY)
			uart->thr_ipending = 0;
		break;
	case LSR:
		*access->data = uart->line_errors | (uart->is_stalled ? 0 : LSR_EMPTY) |
				(uart->received_count ? LSR_DR : 0);
		uart->line_errors = 0;
		break;
	default:
		return 0;
	}
	return 1;
}

static int uart_write(struct pyvmm_uart *uart, struct access *access)
{
	uint8_t value = *access->data;

	if (uart->lcr & LCR_DLAB)
		return 0;
	switch (access->offset) {
	case THR:
		if (uart->mcr & MCR_LOOP || uart->is_stalled || !has_room(&uart->output))
			return 0;
		/* Down before it comes up again for this byte: a driver may wait for the edge. */
		uart->thr_ipending = 0;
		uart_update(uart);
		put(&uart->output, value);
		uart->thr_ipending = 1;
		break;
	case IER:
		value &= IER_MASK;
		if ((value ^ uart->ier) & IER_ETBEI)
			uart->thr_ipending = value & IER_ETBEI && !uart->is_stalled;
		uart->ier = value;
		break;
	default:
		return 0;
	}
	return 1;
}

static int answer_uart(struct pyvmm_uart *uart, struct access *access)
{
	int answered;

	if (access->size != 1 || !try_lock(&uart->lock))
		return 0;
	answered = access->is_write ? uart_write(uart, access) : uart_read(uart, access);
	if (answered)
		uart_update(uart);
	unlock(&uart->lock);
	return answered;
}

/* ---- ports without registers ---------------------------------------------------------------- */

static int answer_debugcon(struct pyvmm_debugcon *port, struct access *access)
{
	int answered = 1;

	if (access->size != 1 || !try_lock(&port->lock))
		return 0;
	if (!access->is_write)
		*access->data = port->readback;
	else if (port->has_chardev && (answered = has_room(&port->output)))
		put(&port->output, *access->data);
	unlock(&port->lock);
	return answered;
}

static int answer_nobody(struct access *access)
{
	if (!access->is_write)
		memset(access->data, 0xFF, access->size);
	return 1;
}

/* ---- ACPI's power management timer ---------------------------------------------------------- */

static int answer_pm_timer(const struct pyvmm_pm_timer *timer, struct access *access)
{
	struct timespec now;
	uint64_t ns;
	uint32_t value;

	if (access->is_write || access->offset != PM_TIMER || access->size != sizeof(value) ||
	    clock_gettime(CLOCK_BOOTTIME, &now))
		return 0;
	ns = (uint64_t)now.tv_sec * NS + (uint64_t)now.tv_nsec + (uint64_t)timer->offset;
	/* In two parts: the product of all of it has more than 64 bits. */
	value = (uint32_t)(ns / NS * PM_TIMER_HZ + ns % NS * PM_TIMER_HZ / NS) & PM_TIMER_MASK;
	memcpy(access->data, &value, sizeof(value));
	return 1;
}

/* ---- virtio-mmio ---------------------------------------------------------------------------- */

static int read_config(struct pyvmm_config *config, const void *from, struct access *access)
{
	if (!try_lock(&config->lock))
		return 0;
	memcpy(access->data, from, access->size);
	unlock(&config->lock);
	return 1;
}

static int answer_virtio_mmio(struct pyvmm_virtio_mmio *regs, struct access *access)
{
	struct pyvmm_config *config = regs->config;
	uint32_t value;

	/* Of any width that a register of a device has, and not beyond its end. */
	if (access->offset >= CONFIG)
		return !access->is_write && access->size <= 4 && access->size != 3 &&
		       read_config(config, config->bytes + (access->offset - CONFIG), access);
	if (access->size != 4 || access->offset % 4)
		return 0;
	if (access->is_write) {
		if (access->offset != INTERRUPT_ACK)
			return 0;
		memcpy(&value, access->data, sizeof(value));
		__atomic_fetch_and(&regs->interrupt_status, ~value, __ATOMIC_SEQ_CST);
		return 1;
	}
	switch (access->offset) {
	case INTERRUPT_STATUS:
		value = __atomic_load_n(&regs->interrupt_status, __ATOMIC_SEQ_CST);
		memcpy(access->data, &value, sizeof(value));
		return 1;
	case CONFIG_GENERATION:
		return read_config(config, &config->generation, access);
	}
	return 0;
}

/* ---- the table ------------------------------------------------------------------------------ */

static int answer(const struct pyvmm_region *region, struct access *access, unsigned shift)
{
	const uint64_t *known = access->is_write ? region->writes : region->reads;
	uint64_t bit = access->offset >> shift;

	if (bit >= 128 || !(known[bit / 64] >> bit % 64 & 1))
		return 0;
	switch ((enum pyvmm_kind)region->kind) {
	case PYVMM_UART:
		return answer_uart(region->device, access);
	case PYVMM_DEBUGCON:
		return answer_debugcon(region->device, access);
	case PYVMM_VIRTIO_MMIO:
		return answer_virtio_mmio(region->device, access);
	case PYVMM_PM_TIMER:
		return answer_pm_timer(region->device, access);
	case PYVMM_NOBODY:
		return answer_nobody(access);
	}
	return 0;
}

static int find(const struct pyvmm_region *regions, uint32_t count, uint64_t address,
		struct access *access, unsigned shift)
{
	for (const struct pyvmm_region *region = regions; region < regions + count; region++) {
		access->offset = address - region->start;
		/* Of the access, too, no byte is beyond the region. */
		if (access->offset < region->length &&
		    access->size <= region->length - access->offset)
			return answer(region, access, shift);
	}
	return 0;
}

/* Answer the access that KVM_RUN came back with: whether that was possible. If not, nothing has
 * happened. */
int pyvmm_answer(const struct pyvmm_answers *answers, struct pyvmm_run *run)
{
	struct access access;

	if (run->exit_reason == KVM_EXIT_IO) {
		const struct pyvmm_run_io *io = &run->exit.io;

		if (io->count != 1)
			return 0;
		access.size = io->size;
		access.is_write = io->direction == KVM_EXIT_IO_OUT;
		access.data = (uint8_t *)run + io->data_offset;
		return find(answers->regions, answers->port_count, io->port, &access, 0);
	}
	if (run->exit_reason == KVM_EXIT_MMIO) {
		struct pyvmm_run_mmio *mmio = &run->exit.mmio;

		access.size = mmio->len;
		access.is_write = mmio->is_write;
		access.data = mmio->data;
		return find(answers->regions + answers->port_count, answers->mmio_count,
			    mmio->phys_addr, &access, 2);
	}
	return 0;
}

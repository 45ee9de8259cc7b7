/* What native code answers of a guest's accesses, between two KVM_RUNs and without the interpreter.
 *
 * A device that has such accesses keeps what they read and change in a structure of this file, and
 * nowhere else: Python's methods and the saved state use the same. A table says which accesses of
 * which addresses they are; all others are exits as ever, and so is an access to a device that
 * another thread is in. Nothing here waits. */
#pragma once

#ifndef FOR_CFFI
#include <stdint.h>

#include "kvm.h"
#endif

enum {
	PYVMM_CONFIG_SIZE = 256,
	PYVMM_OUTPUT_SIZE = 4096, /* a power of two */
	PYVMM_FIFO_DEPTH = 16,
};

/* Bytes on their way to a chardev, whose writer takes them in batches. */
struct pyvmm_output {
	uint32_t head, tail; /* of bytes, modulo their number: the oldest, and behind the latest */
	uint32_t is_awaited; /* the writer wants to be told of the next byte */
	int32_t event_fd; /* by this eventfd; negative: there is no writer yet, nothing is taken */
	uint8_t bytes[PYVMM_OUTPUT_SIZE];
};

/* An input of the interrupt controllers. */
struct pyvmm_line {
	int32_t vm_fd; /* negative: the level goes nowhere */
	uint32_t gsi, level;
};

/* A 16550A. */
struct pyvmm_uart {
	uint32_t lock;
	uint16_t divider;
	uint8_t rbr, ier, lcr, mcr, msr, scr, fcr;
	uint8_t line_errors; /* bits of LSR */
	uint8_t thr_ipending; /* the transmitter's interrupt, whether it is enabled or not */
	uint8_t is_stalled; /* the chardev did not take all: the transmitter is not empty */
	uint8_t received_count, received[PYVMM_FIFO_DEPTH]; /* the receive FIFO, the oldest first */
	/* The transmit FIFO: the latest bytes of output. Those before them the guest takes for sent. */
	uint32_t held;
	struct pyvmm_line *line;
	struct pyvmm_output output;
};

/* A port that takes bytes. */
struct pyvmm_debugcon {
	uint32_t lock;
	uint8_t readback; /* what a read gives */
	uint8_t has_chardev; /* or bytes go nowhere */
	struct pyvmm_output output;
};

/* ACPI's power management timer. */
struct pyvmm_pm_timer {
	int64_t offset; /* ns from the host's boot clock to what it counts; changed while no vCPU runs */
};

/* The configuration space of a virtio device. The lock is for a change of it. */
struct pyvmm_config {
	uint32_t lock, generation;
	uint8_t bytes[PYVMM_CONFIG_SIZE];
};

/* The registers of virtio-mmio. */
struct pyvmm_virtio_mmio {
	uint32_t interrupt_status; /* changed by atomic operations, with no lock */
	struct pyvmm_config *config;
};

enum pyvmm_kind {
	PYVMM_UART, /* struct pyvmm_uart */
	PYVMM_DEBUGCON, /* struct pyvmm_debugcon */
	PYVMM_VIRTIO_MMIO, /* struct pyvmm_virtio_mmio */
	PYVMM_PM_TIMER, /* struct pyvmm_pm_timer */
	PYVMM_NOBODY, /* reads as all ones, ignores writes; no structure */
};

/* Accesses to consecutive addresses of one device. */
struct pyvmm_region {
	uint64_t start, length;
	/* By offset, of memory by offset / 4: whether native code knows the access. */
	uint64_t reads[2], writes[2];
	uint32_t kind; /* enum pyvmm_kind */
	uint32_t reserved;
	void *device;
};

/* The table: never changed, but replaced. */
struct pyvmm_answers {
	uint32_t port_count, mmio_count;
	struct pyvmm_region regions[]; /* of ports, and behind them of memory */
};

int pyvmm_answer(const struct pyvmm_answers *answers, struct pyvmm_run *run);

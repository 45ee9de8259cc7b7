/* A program for sanitizers: any accesses to tables of all kinds of devices, as a hostile guest may make
 * them. Arguments: a seed, and how many. */
#include "answers.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

enum { DATA_AT = 4096, DATA_SIZE = 4096, PORTS = 4, KINDS = 7 };

static uint64_t next(uint64_t *state)
{
	/* xorshift64*, Vigna */
	*state ^= *state >> 12;
	*state ^= *state << 25;
	*state ^= *state >> 27;
	return *state * 0x2545F4914F6CDD1DULL;
}

int main(int argc, char **argv)
{
	uint64_t state = argc > 1 ? strtoull(argv[1], NULL, 10) * 2 + 1 : 1;
	uint64_t count = argc > 2 ? strtoull(argv[2], NULL, 10) : 1000, answered = 0;
	struct pyvmm_line line = { .vm_fd = -1, .gsi = 4 };
	/* Each in memory of its own, so that what is beyond its end is seen. */
	struct pyvmm_uart *uart = calloc(1, sizeof(*uart));
	struct pyvmm_debugcon *console = calloc(1, sizeof(*console));
	struct pyvmm_virtio_mmio *mmio = calloc(1, sizeof(*mmio));
	struct pyvmm_pm_timer *timer = calloc(1, sizeof(*timer));
	struct pyvmm_answers *answers = calloc(1, sizeof(*answers) + KINDS * sizeof(answers->regions[0]));
	struct pyvmm_run *run = calloc(1, DATA_AT + DATA_SIZE);

	uart->line = &line;
	uart->output.event_fd = console->output.event_fd = eventfd(0, EFD_NONBLOCK);
	uart->output.is_awaited = console->has_chardev = 1;
	mmio->config = calloc(1, sizeof(*mmio->config));
	answers->port_count = PORTS;
	answers->mmio_count = KINDS - PORTS;
	for (int at = 0; at < KINDS; at++) {
		struct pyvmm_region *region = &answers->regions[at];
		void *const devices[] = { uart, console, NULL, timer, mmio, uart, console };
		const uint32_t kinds[] = { PYVMM_UART, PYVMM_DEBUGCON, PYVMM_NOBODY,
					   PYVMM_PM_TIMER, PYVMM_VIRTIO_MMIO, PYVMM_UART,
					   PYVMM_DEBUGCON };

		region->start = at < PORTS ? (uint64_t)at * 0x100
					   : (uint64_t)(at - PORTS) * 0x1000 - 0x100;
		region->length = at == PORTS ? 0x200 : at == PORTS - 1 ? 12 : 8;
		memset(region->reads, 0xFF, sizeof(region->reads));
		memset(region->writes, 0xFF, sizeof(region->writes));
		region->kind = kinds[at];
		region->device = devices[at];
	}
	while (count--) {
		uint64_t random = next(&state), data = next(&state);
		uint64_t near = answers->regions[random >> 8 & 7 ? random % KINDS : PORTS].start + (random >> 16) % 0x210;

		uart->received_count = (uint8_t)(random >> 40) % (PYVMM_FIFO_DEPTH + 1);
		if (random >> 60 == 0) {
			uart->ier = (uint8_t)data;
			uart->fcr = (uint8_t)(data >> 8);
			uart->msr = (uint8_t)(data >> 16);
			uart->lcr = (uint8_t)(data >> 24);
			uart->mcr = (uint8_t)(data >> 32);
			uart->line_errors = (uint8_t)(data >> 40);
			uart->is_stalled = data >> 48 & 1;
			uart->output.head = uart->output.tail - (uint32_t)(data >> 50) % PYVMM_OUTPUT_SIZE;
			console->output.head = console->output.tail;
			timer->offset = (int64_t)data;
		}
		if (random >> 32 & 1) {
			run->exit_reason = KVM_EXIT_IO;
			run->exit.io.direction = random >> 33 & 1;
			run->exit.io.size = 1 << (random >> 34 & 3) % 3;
			run->exit.io.count = random >> 36 & 7 ? 1 : 1 + (uint32_t)(data & 0x3FF);
			run->exit.io.port = (uint16_t)near;
			run->exit.io.data_offset = DATA_AT + DATA_SIZE - run->exit.io.size;
			memcpy((char *)run + run->exit.io.data_offset, &data, run->exit.io.size);
		} else {
			run->exit_reason = random >> 44 & 15 ? KVM_EXIT_MMIO : (uint32_t)data % 64;
			run->exit.mmio.len = 1 + (random >> 34 & 7);
			run->exit.mmio.is_write = random >> 33 & 1;
			run->exit.mmio.phys_addr = random >> 48 & 15 ? near : data;
			memcpy(run->exit.mmio.data, &data, sizeof(run->exit.mmio.data));
		}
		answered += (uint64_t)pyvmm_answer(answers, run);
	}
	printf("%llu\n", (unsigned long long)answered);
	free(mmio->config);
	free(mmio), free(timer), free(console), free(uart), free(answers), free(run);
	return 0;
}

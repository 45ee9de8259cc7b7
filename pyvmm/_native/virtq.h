/* Frames and blocks between split virtqueues and the host. */
#pragma once

#ifndef FOR_CFFI
#include <stdint.h>
#endif

struct pyvmm_span {
	uint64_t start, end; /* guest-physical, not empty */
	uint8_t *host;       /* where start is */
};

struct pyvmm_ring {
	struct pyvmm_span *spans;  /* what the driver may give for writing */
	uint32_t span_count, size; /* size: a power of two */
	int indirect;              /* whether VIRTIO_F_INDIRECT_DESC was negotiated */
	uint64_t *desc;            /* two for each descriptor */
	uint16_t *avail;           /* flags, idx, ring[size] */
	uint32_t *used;            /* flags and idx, then two for each element */
};

struct pyvmm_received {
	uint32_t spent, chains; /* of the budget; returned */
	uint32_t held;          /* bytes of the frame in the buffer; 0 for none */
};

struct pyvmm_poured {
	uint64_t sent;   /* bytes of the next chain that were written: before the call, and after */
	uint32_t spent, chains; /* of the budget; returned */
	int is_full;     /* whether the descriptor takes no more for now */
};

struct pyvmm_disk {
	int fd;
	int read_flags; /* of preadv2, with which it does not wait; negative: none are read here */
	int writable;   /* whether writes are for here */
	uint32_t block, longest; /* bytes: of which requests are multiples; of a request */
	uint64_t capacity;       /* bytes */
};

int pyvmm_spread(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t used_idx,
		 const uint8_t *frame, uint32_t length, int mergeable);
void pyvmm_receive(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t used_idx, int fd,
		   uint8_t *buffer, uint32_t size, uint32_t shortest, int mergeable, int plain,
		   uint32_t budget, uint32_t least, struct pyvmm_received *received);
int pyvmm_send(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t used_idx, int fd,
	       uint32_t shortest, uint32_t longest, int most);
void pyvmm_pour(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t used_idx, int fd,
		uint32_t budget, uint32_t least, struct pyvmm_poured *poured);
int pyvmm_serve(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t used_idx,
		const struct pyvmm_disk *disk, int most);

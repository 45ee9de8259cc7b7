/* What is done for a block of guest RAM beside the guest, a little at a time: it is mapped ahead, and
 * huge pages are made of it. */
#pragma once

#ifndef FOR_CFFI
#include <stdint.h>
#endif

/* One block. What is said to be read meanwhile may be, by any thread. */
struct pyvmm_upkeep {
	uint8_t *start; /* a multiple of 2 MiB */
	uint8_t *huge;	/* a byte for each 2 MiB of it: whether they are a huge page; read meanwhile */
	uint32_t count; /* of these */
	uint32_t made;	/* how many are; read meanwhile */
	uint32_t least; /* a huge page is made where so many of its 512 pages have memory */
	uint32_t is_shared; /* whether it is a file's, mapped shared */
	uint32_t stop;	    /* pyvmm_stop_upkeep; 0 to begin with */
	int32_t error;	    /* the last that the kernel gave for one of the huge pages, or 0 */
	int64_t work_ns;    /* it rests after so much work */
	int64_t rests, rest_ns, longest_rest_ns; /* so many times as long, and within these bounds */
	int64_t longest_ns; /* how long one huge page took at most; read meanwhile */
};

int pyvmm_map_ahead(struct pyvmm_upkeep *upkeep);
int pyvmm_collapse(struct pyvmm_upkeep *upkeep);
void pyvmm_stop_upkeep(struct pyvmm_upkeep *upkeep);

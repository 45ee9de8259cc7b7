/* It does without the interpreter, whose lock the vCPUs' threads want. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "upkeep.h"

#include <errno.h>
#include <sys/mman.h>
#include <time.h>

#include "raw.h"

enum { PAGE = 4096, PAGES = 512, HUGE_PAGE = PAGES * PAGE };
/* Of madvise(2), Linux 5.14 and 6.1; Debian's headers were there before. */
enum { POPULATE_READ = 22, COLLAPSE = 25 };

/* Where a pass over the memory is. */
struct pass {
	struct pyvmm_upkeep *upkeep;
	int64_t began; /* to work, after the last rest */
	int64_t rests, rest_ns, longest_rest_ns;
};

/* Rest, if it is time to: whether to go on. */
static int go_on(struct pass *pass)
{
	uint32_t *stop = &pass->upkeep->stop;
	int64_t worked = raw_clock(CLOCK_MONOTONIC) - pass->began, rest = worked * pass->rests;

	if (worked >= pass->upkeep->work_ns) {
		rest = rest < pass->rest_ns ? pass->rest_ns : rest;
		wait_word(stop, 0, rest > pass->longest_rest_ns ? pass->longest_rest_ns : rest);
		pass->began = raw_clock(CLOCK_MONOTONIC);
	}
	return !load_word(stop);
}

/* Which of the pages of 2 MiB have memory, and how many. Of shared memory it is the file that has it,
 * mapped here or not. */
static uint32_t find_present(uint8_t *start, unsigned char present[PAGES])
{
	uint32_t count = 0;

	if (mincore(start, HUGE_PAGE, present))
		return 0;
	for (int i = 0; i < PAGES; i++)
		count += present[i] &= 1;
	return count;
}

/* Map what there is of memory that an image before has filled: 0, or the negative error number;
 * ECANCELED: it was stopped. Where this process's tables have a page KVM needs no fault of its own to
 * find it, and takes its neighbours with it. A page that has no memory gets none. */
int pyvmm_map_ahead(struct pyvmm_upkeep *upkeep)
{
	struct pass pass = { upkeep, raw_clock(CLOCK_MONOTONIC), 1, 0, upkeep->longest_rest_ns };
	unsigned char present[PAGES];

	for (uint32_t i = 0; i < upkeep->count; i++) {
		uint8_t *start = upkeep->start + (uint64_t)i * HUGE_PAGE;

		if (!go_on(&pass))
			return -ECANCELED;
		if (!find_present(start, present))
			continue;
		for (int first = 0, end; first < PAGES; first = end) {
			size_t size;

			end = first + 1;
			while (end < PAGES && present[end] == present[first])
				end++;
			size = (size_t)(end - first) * PAGE;
			if (present[first] && madvise(start + first * PAGE, size, POPULATE_READ))
				return -errno;
		}
	}
	return 0;
}

/* Make a huge page, for which the kernel copies 512 others: 0, or the error number. Whoever touches
 * it meanwhile waits. */
static int make(const struct pyvmm_upkeep *upkeep, uint8_t *start)
{
	/* Out of each table that maps them the kernel takes the pages one by one, and tells KVM of
	 * each. Taken out all at once before, which is quicker by far, they are in the file still.
	 * Not before it is known that this kernel makes any. */
	if (upkeep->is_shared && upkeep->made)
		madvise(start, HUGE_PAGE, MADV_DONTNEED);
	return madvise(start, HUGE_PAGE, COLLAPSE) ? errno : 0;
}

/* Make huge pages of all that is there and is none yet: 0, or the negative error number for which
 * the host makes none at this time; ECANCELED: it was stopped. */
int pyvmm_collapse(struct pyvmm_upkeep *upkeep)
{
	struct pass pass = { upkeep, raw_clock(CLOCK_MONOTONIC), upkeep->rests, upkeep->rest_ns,
			     upkeep->longest_rest_ns };
	unsigned char present[PAGES];

	upkeep->error = 0;
	for (uint32_t i = 0; i < upkeep->count; i++) {
		uint8_t *start = upkeep->start + (uint64_t)i * HUGE_PAGE;
		int64_t before, took;
		int error;

		if (upkeep->huge[i])
			continue;
		if (!go_on(&pass))
			return -ECANCELED;
		if (find_present(start, present) < upkeep->least)
			continue;
		before = raw_clock(CLOCK_MONOTONIC);
		error = make(upkeep, start);
		took = raw_clock(CLOCK_MONOTONIC) - before;
		if (took > upkeep->longest_ns)
			upkeep->longest_ns = took;
		if (!error) {
			upkeep->huge[i] = 1;
			upkeep->made++;
			continue;
		}
		upkeep->error = error;
		/* No huge page is free, or the control group may have no more memory. Other errors
		 * are of these pages: somebody has one of them in use. */
		if (error == ENOMEM || error == EBUSY)
			return -error;
	}
	return 0;
}

/* Have the others return as soon as they are done with the 2 MiB that they are at. Any thread. */
void pyvmm_stop_upkeep(struct pyvmm_upkeep *upkeep)
{
	store_word(&upkeep->stop, 1);
	wake_word(&upkeep->stop);
}

/* A frame of 64 KiB goes into dozens of small buffers, at a few microseconds of Python each, and
 * small frames and blocks are many. Here is only what drivers do all the time (virtio 1.3, 5.1.6
 * and 5.2.6): buffers in RAM; to receive frames, one direct descriptor each; otherwise a chain of
 * a few. All else, broken rings and memory that the host cannot back included, is left to Python,
 * which takes the same chain again and judges it.
 *
 * The driver runs on other processors and may change all of it meanwhile: what is looked at is
 * read once. What the specification demands of the order (2.7.8, 2.7.13) x86 keeps by itself:
 * loads stay in the order of the program, and stores do. For the compiler, all accesses to rings
 * are volatile, and between a copy into a buffer and the index that shows it there is the end of
 * GUARDED or a system call. Only where a load must not overtake a store, around the suppression of
 * notifications (2.7.7, 2.7.10), is a barrier due, which is the caller's: pyvmm_barrier. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "virtq.h"

#include <errno.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_net.h>
#include <linux/virtio_ring.h>
#include <stddef.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#include "guard.h"

typedef uint64_t __attribute__((aligned(1))) unaligned_u64;

enum { MAX_BUFFERS = 64, NET_HEADER = sizeof(struct virtio_net_hdr_mrg_rxbuf) };

/* Where a buffer of the driver's is; NULL: not in RAM, or in more than one piece of it. Looks at
 * what does not change while the queue is ready. */
static uint8_t *guest_buffer(const struct pyvmm_ring *ring, uint64_t gpa, uint32_t length)
{
	for (uint32_t i = 0; i < ring->span_count; i++) {
		const struct pyvmm_span *span = &ring->spans[i];

		if (gpa >= span->start && gpa < span->end && length <= span->end - gpa)
			return span->host + (gpa - span->start);
	}
	return NULL;
}

/* Write an element of the used ring. The driver looks at it once the index is beyond it, so that
 * has to be stored later. */
static void put_used(const struct pyvmm_ring *ring, uint16_t at, uint32_t head, uint32_t written)
{
	volatile uint32_t *element = ring->used + 1 + 2 * (at & (ring->size - 1));

	element[0] = head;
	element[1] = written;
}

/* pyvmm_spread, unguarded. The available index is read before the ring's entries, and those before
 * the descriptors: what the driver stored before it moved the index is then there. */
static int spread(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t used_idx,
		  const uint8_t *frame, uint32_t length, int mergeable)
{
	const volatile uint16_t *avail = ring->avail;
	uint16_t waiting = avail[1] - last_avail;
	uint8_t *header = NULL;
	uint32_t done = 0;
	uint16_t count = 0;

	if (waiting > ring->size || length < NET_HEADER)
		return 0;
	while (done < length) {
		if (count == waiting)
			/* With a whole ring of them there will never be more. */
			return count == ring->size ? 0 : ~(int)count;
		uint16_t head = avail[2 + ((last_avail + count) & (ring->size - 1))];
		if (head >= ring->size)
			return 0;
		const volatile uint64_t *desc = ring->desc + 2 * head;
		uint64_t gpa = desc[0], rest = desc[1];
		uint32_t room = (uint32_t)rest, part = length - done;
		uint8_t *buffer = guest_buffer(ring, gpa, room);
		if ((uint16_t)(rest >> 32) != VRING_DESC_F_WRITE || !room || !buffer)
			return 0;
		if (part > room) {
			if (!mergeable)
				return 0;
			part = room;
		}
		if (!count) {
			if (part < NET_HEADER)
				return 0;
			header = buffer;
		}
		memcpy(buffer, frame + done, part);
		put_used(ring, used_idx + count, head, part);
		done += part;
		count++;
	}
	memcpy(header + offsetof(struct virtio_net_hdr_mrg_rxbuf, num_buffers), &count, 2);
	return count;
}

/* Put a frame, which begins with its header, into the next chains of a queue, and their
 * elements into the used ring, without returning them: the caller moves the index.
 *
 * How many chains that took; 0 if it cannot be done here; ~N if only N chains are there, and
 * they are too few.
 *
 * All stores are done when it returns, so that the index, stored later, is seen later. It moves
 * once for all chains of a frame: their number is in the first of them (5.1.6.3.2). */
int pyvmm_spread(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t used_idx,
			const uint8_t *frame, uint32_t length, int mergeable)
{
	volatile int count = 0;

	GUARDED(count = spread(ring, last_avail, used_idx, frame, length, mergeable));
	return count;
}

/* Read frames, headers first, from a descriptor that gives one each time, spread them and
 * return their chains. Shorter ones than that are dropped. It ends when there is no frame, when
 * one cannot be spread, which is then left in the buffer, or when the budget is spent: of each
 * frame its bytes, but no less than least. With plain so is one left whose header asks for what
 * not every driver can do.
 *
 * The used index is stored for each frame, after its buffers and elements. Whether the driver
 * wants an interrupt is the caller's to read, behind a barrier. */
void pyvmm_receive(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t used_idx,
			  int fd, uint8_t *buffer, uint32_t size, uint32_t shortest,
			  int mergeable, int plain, uint32_t budget, uint32_t least,
			  struct pyvmm_received *received)
{
	const struct virtio_net_hdr *header = (const struct virtio_net_hdr *)buffer;
	volatile uint16_t *used = (volatile uint16_t *)ring->used;

	*received = (struct pyvmm_received){ 0 };
	while (received->spent < budget) {
		ssize_t length = read(fd, buffer, size);
		if (length < 0)
			break;
		if (length >= shortest) {
			int count = 0;
			if (!plain || !(header->flags || header->gso_type))
				count = pyvmm_spread(ring, last_avail, used_idx, buffer,
						     (uint32_t)length, mergeable);
			if (count <= 0 || !GUARDED(used[1] = used_idx + count)) {
				received->held = (uint32_t)length;
				break;
			}
			last_avail += count;
			used_idx += count;
			received->chains += count;
		}
		received->spent += length > least ? (uint32_t)length : least;
	}
}

struct chain {
	struct iovec buffers[MAX_BUFFERS]; /* those for reading come first */
	int readable, count;
	uint64_t readable_size, writable_size; /* bytes */
};

/* Read a chain: whether it is one that can be served here. Each descriptor is loaded in two halves,
 * which the driver leaves alone until the chain is returned; if not, each half is judged as read. */
static int gather(const struct pyvmm_ring *ring, uint32_t index, struct chain *chain)
{
	const volatile unaligned_u64 *table = ring->desc;
	uint32_t entries = ring->size;
	int may_jump = ring->indirect;

	chain->readable = chain->count = 0;
	chain->readable_size = chain->writable_size = 0;
	while (chain->count < MAX_BUFFERS && index < entries) {
		uint64_t gpa = table[2 * index], rest = table[2 * index + 1];
		uint32_t size = (uint32_t)rest;
		uint16_t flags = rest >> 32;
		uint8_t *at = guest_buffer(ring, gpa, size);
		if (!size || !at)
			return 0;
		if (flags == VRING_DESC_F_INDIRECT && may_jump) {
			if (size % sizeof(struct vring_desc))
				return 0;
			table = (const volatile unaligned_u64 *)at;
			entries = size / sizeof(struct vring_desc);
			index = 0;
			may_jump = 0;
			continue;
		}
		if (flags & ~(VRING_DESC_F_NEXT | VRING_DESC_F_WRITE))
			return 0;
		chain->buffers[chain->count++] = (struct iovec){ at, size };
		if (flags & VRING_DESC_F_WRITE) {
			chain->writable_size += size;
		} else {
			if (chain->writable_size)
				return 0;
			chain->readable_size += size;
			chain->readable++;
		}
		if (!(flags & VRING_DESC_F_NEXT))
			return 1;
		index = rest >> 48;
	}
	return 0;
}

/* The next chain that waits in a queue: whether there is one that can be served here. The index is
 * read first, then the entry, then the descriptors, as in spread. */
static int take(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t *head,
		struct chain *chain)
{
	const volatile uint16_t *avail = ring->avail;
	uint16_t waiting = avail[1] - last_avail;

	if (!waiting || waiting > ring->size)
		return 0;
	*head = avail[2 + (last_avail & (ring->size - 1))];
	return gather(ring, *head, chain);
}

/* Return a chain: the element first, then the index that shows it. What the chain's buffers were
 * given was stored before, by this thread or for it by the kernel. */
static void give_back(const struct pyvmm_ring *ring, uint16_t used_idx, uint32_t head,
		      uint32_t written)
{
	put_used(ring, used_idx, head, written);
	((volatile uint16_t *)ring->used)[1] = used_idx + 1;
}

/* Do the next chain of pyvmm_send: whether that was done. The driver may fill the buffers anew once
 * the index has moved; by then writev has read them. */
static int send_next(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t used_idx, int fd,
		     uint32_t shortest, uint32_t longest)
{
	struct chain chain;
	uint16_t head;

	if (!take(ring, last_avail, &head, &chain) || chain.writable_size)
		return 0;
	if (chain.readable_size < shortest || chain.readable_size > longest)
		return 0;
	if (writev(fd, chain.buffers, chain.count) < 0 &&
	    (errno == EAGAIN || errno == EINTR || errno == EFAULT))
		return 0;
	give_back(ring, used_idx, head, 0);
	return 1;
}

/* Write the frames that wait in a queue, headers first, each with one call, and return them.
 * Frames shorter or longer than that are left, as is one that the descriptor does not take yet;
 * one that it never takes is dropped. How many were done, most of them at once.
 *
 * The used index is stored for each chain. Whether the driver wants an interrupt is the caller's
 * to read, behind a barrier; so is whether one more chain waits, once kicks are asked for. */
int pyvmm_send(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t used_idx,
		      int fd, uint32_t shortest, uint32_t longest, int most)
{
	volatile int sent = 1;
	int done;

	for (done = 0; done < most; done++) {
		if (!GUARDED(sent = send_next(ring, last_avail + done, used_idx + done, fd,
					      shortest, longest)) || !sent)
			break;
	}
	return done;
}

/* Bytes and chains that one call writes: the driver has them back while the next are written. */
enum { POUR_BYTES = 64 << 10, POUR_CHAINS = 64 };

struct batch {
	struct iovec parts[2 * MAX_BUFFERS];
	uint32_t sizes[POUR_CHAINS]; /* of each chain, all of it */
	int part_count, chain_count;
	uint32_t bytes; /* in parts */
};

/* Add what lies behind the first skip bytes of a chain, as far as there is room in a batch. */
static void add_parts(struct batch *batch, const struct chain *chain, uint64_t skip)
{
	for (int i = 0; i < chain->count && batch->bytes < POUR_BYTES; i++) {
		struct iovec part = chain->buffers[i];

		if (skip >= part.iov_len) {
			skip -= part.iov_len;
			continue;
		}
		part.iov_base = (uint8_t *)part.iov_base + skip;
		part.iov_len -= skip;
		skip = 0;
		if (part.iov_len > POUR_BYTES - batch->bytes)
			part.iov_len = POUR_BYTES - batch->bytes;
		batch->bytes += part.iov_len;
		batch->parts[batch->part_count++] = part;
	}
}

/* Collect the next chains for one call, the first from its byte sent on. Their elements go into
 * the used ring at once, where the driver does not look before the index is beyond them, and so
 * does the index, unchanged: should the host have no memory there, nothing was written yet. */
static void collect(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t used_idx,
		    uint64_t sent, struct batch *batch)
{
	struct chain chain;
	uint16_t head;

	batch->part_count = batch->chain_count = 0;
	batch->bytes = 0;
	((volatile uint16_t *)ring->used)[1] = used_idx;
	while (batch->bytes < POUR_BYTES && batch->chain_count < POUR_CHAINS &&
	       batch->chain_count < (int)ring->size && batch->part_count < MAX_BUFFERS &&
	       take(ring, last_avail + batch->chain_count, &head, &chain)) {
		/* A chain that was begun may be another by now, and shorter. */
		if (chain.writable_size || chain.readable_size > UINT32_MAX ||
		    sent >= chain.readable_size)
			break;
		put_used(ring, used_idx + batch->chain_count, head, 0);
		batch->sizes[batch->chain_count++] = (uint32_t)chain.readable_size;
		add_parts(batch, &chain, sent);
		sent = 0;
	}
}

/* Do one call of pyvmm_pour: whether another may follow. */
static int pour_next(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t used_idx, int fd,
		     uint32_t least, struct pyvmm_poured *poured)
{
	struct batch batch;
	uint16_t index = used_idx + poured->chains;
	int done = 0;

	collect(ring, last_avail + poured->chains, index, poured->sent, &batch);
	if (!batch.chain_count)
		return 0;
	ssize_t written = writev(fd, batch.parts, batch.part_count);
	if (written < 0) {
		poured->is_full = errno == EAGAIN;
		return 0;
	}
	poured->is_full = (uint32_t)written < batch.bytes;
	poured->spent += written > (ssize_t)(least * batch.chain_count) ?
				 (uint32_t)written : least * batch.chain_count;
	poured->sent += written;
	while (done < batch.chain_count && poured->sent >= batch.sizes[done])
		poured->sent -= batch.sizes[done++];
	poured->chains += done;
	((volatile uint16_t *)ring->used)[1] = index + done;
	return !poured->is_full;
}

/* Write the bytes that wait in a queue to a stream, many chains with one call, and return those
 * that were written to their end. It stops in front of a chain that is not for here, when the
 * descriptor takes no more or has an error, or when the budget is spent: of each chain that is
 * written its bytes, but no less than least.
 *
 * The used index is stored after each call. What remains for the caller is as with pyvmm_send. */
void pyvmm_pour(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t used_idx, int fd,
		uint32_t budget, uint32_t least, struct pyvmm_poured *poured)
{
	volatile int more = 1;

	poured->spent = poured->chains = 0;
	poured->is_full = 0;
	/* No more may be under way than there are elements in the used ring. */
	if (last_avail != used_idx)
		return;
	while (poured->spent < budget) {
		if (!GUARDED(more = pour_next(ring, last_avail, used_idx, fd, least, poured)) ||
		    !more)
			break;
	}
}

enum { SECTOR = 512, BLK_HEADER = sizeof(struct virtio_blk_outhdr) };

/* Read or write what a request asks for, all of it: whether that was done. The header is read once.
 * The status is stored behind the data, and both before the chain is returned. */
static int transfer(const struct pyvmm_disk *disk, struct chain *chain)
{
	struct iovec *first = chain->buffers, *last = first + chain->count - 1;
	ssize_t done = -1;

	if (!chain->readable || first->iov_len < BLK_HEADER || !chain->writable_size ||
	    chain->readable_size + chain->writable_size > BLK_HEADER + disk->longest + 1)
		return 0;
	const volatile unaligned_u64 *header = first->iov_base;
	uint32_t type = (uint32_t)header[0];
	uint64_t sector = header[1];
	uint64_t size = type == VIRTIO_BLK_T_IN ? chain->writable_size - 1 :
						  chain->readable_size - BLK_HEADER;
	if (sector > disk->capacity / SECTOR || size > disk->capacity - sector * SECTOR ||
	    (sector * SECTOR | size) % disk->block)
		return 0;
	first->iov_base = (uint8_t *)first->iov_base + BLK_HEADER;
	first->iov_len -= BLK_HEADER;
	volatile uint8_t *status = (uint8_t *)last->iov_base + --last->iov_len;
	if (type == VIRTIO_BLK_T_IN && disk->read_flags >= 0)
		done = preadv2(disk->fd, first + chain->readable, chain->count - chain->readable,
			       sector * SECTOR, disk->read_flags);
	else if (type == VIRTIO_BLK_T_OUT && disk->writable)
		done = pwritev(disk->fd, first, chain->readable, sector * SECTOR);
	if (done < 0 || (uint64_t)done != size)
		return 0;
	*status = VIRTIO_BLK_S_OK;
	return 1;
}

/* Do the next request of pyvmm_serve: whether that was done. */
static int serve_next(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t used_idx,
		      const struct pyvmm_disk *disk)
{
	struct chain chain;
	uint16_t head;

	if (!take(ring, last_avail, &head, &chain) || !transfer(disk, &chain))
		return 0;
	give_back(ring, used_idx, head, (uint32_t)chain.writable_size);
	return 1;
}

/* Serve the requests that wait in a queue, up to the first that this is nothing for, or that
 * the host does not do at once: that one is left, and begun anew by Python. How many were done,
 * most of them at once.
 *
 * The used index is stored for each request, after its data, status and element, and before the
 * next request is read. What remains for the caller is as with pyvmm_send. */
int pyvmm_serve(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t used_idx,
		       const struct pyvmm_disk *disk, int most)
{
	volatile int served = 1;
	int done;

	/* No more may be under way than there are elements in the used ring. */
	if ((uint16_t)(last_avail - used_idx) >= ring->size)
		return 0;
	for (done = 0; done < most; done++) {
		if (!GUARDED(served = serve_next(ring, last_avail + done, used_idx + done, disk)) ||
		    !served)
			break;
	}
	return done;
}

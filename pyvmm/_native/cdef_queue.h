/* Frames and blocks between queues and the host (shim.c). */

struct pyvmm_span { uint64_t start, end; uint8_t *host; };
struct pyvmm_ring {
	struct pyvmm_span *spans;
	uint32_t span_count, size;
	int indirect;
	uint64_t *desc;
	uint16_t *avail;
	uint32_t *used;
};
struct pyvmm_received { uint32_t spent, chains, held; };
int pyvmm_spread(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t used_idx,
		 const uint8_t *frame, uint32_t length, int mergeable);
void pyvmm_receive(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t used_idx, int fd,
		   uint8_t *buffer, uint32_t size, uint32_t shortest, int mergeable,
		   uint32_t budget, uint32_t least, struct pyvmm_received *received);
int pyvmm_send(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t used_idx, int fd,
	       uint32_t shortest, uint32_t longest, int most);

struct pyvmm_image {
	int fd, read_flags, writable;
	uint32_t block, longest;
	uint64_t capacity;
};
int pyvmm_serve(const struct pyvmm_ring *ring, uint16_t last_avail, uint16_t used_idx,
		const struct pyvmm_image *image, int most);

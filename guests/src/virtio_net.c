/* virtio-net: answers ARP for its address, ICMP echo, UDP and frames of a type of its own;
 * mode=send sends numbered frames as fast as they are taken. For measurements: mode=flood sends the
 * same frame again and again; mode=sink takes frames and tells how many they were, every so often. */
#include "virtio.h"

enum { F_CSUM = 1 << 0, F_GUEST_CSUM = 1 << 1, F_MAC = 1 << 5, F_MRG_RXBUF = 1 << 15 };
struct header { u8 flags, gso_type; u16 hdr_len, gso_size, csum_start, csum_offset, num_buffers; };

#define FRAME (70000 + sizeof(struct header))
#define TX_FRAMES 128
#define ETHER 14
#define TYPE_TEST 0x88b5         /* IEEE 802: for local experiments */

static struct vdev dev;
static struct vq *rx, *tx;
static u8 mac[6], ip[4] = {10, 9, 0, 2}, *frames;
static u32 used_frames, under_way, buffer;

static u16 get16(const u8 *p) { return (u16)(p[0] << 8 | p[1]); }

static bool same(const u8 *a, const u8 *b, u32 n)
{
    while (n--)
        if (*a++ != *b++)
            return 0;
    return 1;
}

static void swap(u8 *a, u8 *b, u32 n)
{
    for (; n--; a++, b++) {
        u8 old = *a;
        *a = *b;
        *b = old;
    }
}

/* A frame to be sent: a new one, or the first that was sent. */
static u8 *frame_new(void)
{
    u32 len;
    u8 *done = vq_reap(tx, &len);
    if (!done && used_frames < TX_FRAMES)
        return frames + FRAME * used_frames++;
    under_way--;
    return done ? done : vq_wait(tx, &len);
}

static void frame_send(u8 *frame, u32 len)
{
    struct vbuf bufs[2] = {{frame, sizeof(struct header), 0}, {frame + sizeof(struct header), len - (u32)sizeof(struct header), 0}};
    if (!vq_add(tx, bufs, 2, frame))
        fail("the transmit queue is full");
    under_way++;
    vq_kick(tx);
}

static void buffer_add(u8 *at)
{
    struct vbuf buf = {at, buffer, 1};
    if (!vq_add(rx, &buf, 1, at))
        fail("the receive queue is full");
}

/* The next frame with its header, put together from its buffers; its length. */
static u32 frame_receive(u8 *to)
{
    u32 total = 0, len, count = 1;
    u8 *part = vq_wait(rx, &len);
    for (u32 n = 0; n < count; n++) {
        if (n && !(part = vq_reap(rx, &len)))
            fail("a frame of %u buffers, only %u of them came", count, n);
        if (!n)
            count = ((struct header *)part)->num_buffers;
        if (!len || len > buffer || total + len > FRAME || (n + 1 < count && len != buffer))
            fail("%u bytes in buffer %u of %u", len, n, count);
        memcpy(to + total, part, len);
        total += len;
        buffer_add(part);
    }
    vq_kick(rx);
    if (!count || total < sizeof(struct header) + ETHER)
        fail("a frame of %u bytes in %u buffers", total, count);
    return total;
}

static bool answer_arp(u8 *arp)
{
    static const u8 request[] = {0, 1, 8, 0, 6, 4, 0, 1};
    if (!same(arp, request, sizeof request) || !same(arp + 24, ip, 4))
        return 0;
    arp[7] = 2;
    swap(arp + 8, arp + 18, 10);
    memcpy(arp + 8, mac, 6);
    return 1;
}

/* Sums do not change by an exchange of the addresses or ports in them. */
static bool answer_ip(u8 *p)
{
    u8 *inner = p + 4 * (p[0] & 15);
    if (p[0] >> 4 != 4 || !same(p + 16, ip, 4))
        return 0;
    swap(p + 12, p + 16, 4);
    if (p[9] == 17) {
        swap(inner, inner + 2, 2);
        return 1;
    }
    if (p[9] != 1 || inner[0] != 8)
        return 0;
    inner[0] = 0;
    u32 sum = get16(inner + 2) + 0x800u;
    sum += sum >> 16;
    inner[2] = (u8)(sum >> 8);
    inner[3] = (u8)sum;
    return 1;
}

static bool answer(u8 *e)
{
    u16 type = get16(e + 12);
    bool ours = type == 0x0806 ? answer_arp(e + ETHER) : type == 0x0800 ? answer_ip(e + ETHER) : type == TYPE_TEST;
    memcpy(e, e + 6, 6);
    memcpy(e + 6, mac, 6);
    return ours;
}

static void echo(u64 step)
{
    for (u64 count = 1;;) {
        u8 *frame = frame_new();
        u32 len = frame_receive(frame);
        /* The header goes back as it came: a checksum that was left out is left out again. */
        ((struct header *)frame)->num_buffers = 0;
        while (!answer(frame + sizeof(struct header)))
            len = frame_receive(frame);
        frame_send(frame, len);
        if (count % step == 0) {
            print("net %lu\n", count);
            if (last_round(count / step))
                return;
        }
        count++;
    }
}

static void address(u8 *e)
{
    memset(e, 0xff, 6);
    memcpy(e + 6, mac, 6);
    e[12] = TYPE_TEST >> 8;
    e[13] = TYPE_TEST & 0xff;
}

static void send(u64 step, u32 most)
{
    for (u64 count = 1;; count++) {
        u8 *frame = frame_new(), *e = frame + sizeof(struct header);
        u32 len = 60 + (u32)(count * 7919 % (most - 59));
        memset(frame, 0, sizeof(struct header));
        address(e);
        memcpy(e + ETHER, &count, sizeof count);
        memset(e + ETHER + sizeof count, (u8)count, len - ETHER - sizeof count);
        frame_send(frame, len + sizeof(struct header));
        if (count % step == 0) {
            print("net %lu\n", count);
            if (last_round(count / step))
                return;
        }
    }
}

static void flood(u32 size)
{
    for (u32 i = 0; i < TX_FRAMES; i++)
        address(frames + FRAME * i + sizeof(struct header));
    for (;;)
        frame_send(frame_new(), size + (u32)sizeof(struct header));
}

/* The frames' contents are left where they are; an answer for each step of them. */
static void sink(u64 step)
{
    for (u64 count = 1;; count++) {
        u32 len;
        u8 *part = vq_wait(rx, &len);
        u32 parts = ((struct header *)part)->num_buffers;
        bool counts = get16(part + sizeof(struct header) + 12) == TYPE_TEST;
        while (buffer_add(part), --parts)
            if (!(part = vq_reap(rx, &len)))
                fail("a frame of which %u buffers lack", parts);
        vq_kick(rx);
        if (!counts)
            count--;
        else if (count % step == 0) {
            u8 *frame = frame_new(), *e = frame + sizeof(struct header);
            address(e);
            memcpy(e + ETHER, &count, sizeof count);
            frame_send(frame, 60 + sizeof(struct header));
        }
    }
}

void virtio_net(void)
{
    u64 step = opt_num("step", 256), most = opt_num("size", 1514), features = F_MAC;
    if (!virtio_find(&dev, 1, 0))
        fail("there is no network device");
    if (!opt("nomerge"))
        features |= F_MRG_RXBUF;
    if (opt("offload"))
        features |= F_CSUM | F_GUEST_CSUM;
    virtio_negotiate(&dev, features);
    rx = vq_new(&dev, 0, 0);
    tx = vq_new(&dev, 1, 0);
    virtio_ready(&dev);
    for (u32 i = 0; i < 6; i++)
        mac[i] = (u8)(virtio_config(&dev, i & 4) >> 8 * (i & 3));
    frames = ram_alloc(FRAME * TX_FRAMES);
    buffer = (u32)opt_num("buffer", 2048);
    u8 *space = ram_alloc((u64)buffer * rx->size);
    for (u32 i = 0; i < rx->size; i++)
        buffer_add(space + i * buffer);
    vq_kick(rx);
    print("virtio-net ready %x:%x:%x:%x:%x:%x\n", mac[0], mac[1], mac[2], mac[3], mac[4], mac[5]);
    const char *mode = opt("mode");
    if (mode && !strcmp(mode, "send"))
        send(step, (u32)most);
    else if (mode && !strcmp(mode, "flood"))
        flood((u32)most);
    else if (mode && !strcmp(mode, "sink"))
        sink(step);
    else
        echo(step);
    for (u32 len; under_way; under_way--)
        vq_wait(tx, &len);
}

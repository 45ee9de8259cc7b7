/* virtio-console: a port of a console device. mode=lines writes numbered lines as fast as they are
 * taken; mode=echo writes back what comes, buffer by buffer, all of it once and in order. */
#include "virtio.h"

#define F_MULTIPORT 2
enum { DEVICE_READY = 0, PORT_ADD = 1, PORT_READY = 3, PORT_OPEN = 6 };
#define BUFFERS 16
#define BUFFER 64        /* small, so that a flood needs many of them */
#define LINES 32         /* lines under way */

struct control { u32 id; u16 event, value; };

static struct vdev dev;
static struct vq *rx, *tx, *control_in, *control_out;

static void send_control(u32 id, u16 event)
{
    static struct control message;
    u32 len;
    message = (struct control){id, event, 1};
    struct vbuf buf = {&message, sizeof message, 0};
    vq_add(control_out, &buf, 1, &message);
    vq_kick(control_out);
    vq_wait(control_out, &len);
}

/* The device adds the port; the driver says that it has it, and opens it. */
static void open_port(u32 port)
{
    struct { struct control c; u8 more[64 - sizeof(struct control)]; } *in = ram_alloc(8 * 64), *got;
    u32 len;
    for (u32 i = 0; i < 8; i++) {
        struct vbuf buf = {&in[i], sizeof in[i], 1};
        vq_add(control_in, &buf, 1, &in[i]);
    }
    vq_kick(control_in);
    send_control(0, DEVICE_READY);
    do {
        got = vq_wait(control_in, &len);
        struct vbuf buf = {got, sizeof *got, 1};
        vq_add(control_in, &buf, 1, got);
        vq_kick(control_in);
    } while (got->c.id != port || got->c.event != PORT_ADD);
    send_control(port, PORT_READY);
    send_control(port, PORT_OPEN);
}

static u32 format(u8 *to, u64 n)
{
    u8 digits[20];
    u32 count = 0, len = 0;
    do
        digits[count++] = (u8)('0' + n % 10);
    while (n /= 10);
    memcpy(to, "line ", 5);
    for (len = 5; count;)
        to[len++] = digits[--count];
    to[len++] = '\n';
    return len;
}

static void lines(void)
{
    u8 *space = ram_alloc(LINES * BUFFER), *at;
    u32 len, under_way = 0;
    for (u64 n = 1;; n++) {
        at = under_way < LINES ? space + under_way++ * BUFFER : vq_wait(tx, &len);
        struct vbuf buf = {at, format(at, n), 0};
        vq_add(tx, &buf, 1, at);
        vq_kick(tx);
        if (last_round(n))
            break;
    }
    while (under_way--)
        vq_wait(tx, &len);
}

/* As much as the device takes, for measurements. spin: one buffer at a time and no interrupt, as
 * Linux writes to its consoles (hvc). */
static void flood(void)
{
    u64 size = opt_num("size", 4096), bytes = 0, step = opt_num("step", 16) << 20, next = step;
    u8 *space = ram_alloc(LINES * size), *at;
    u32 len, under_way = 0;
    bool spin = opt("spin");
    memset(space, 'x', LINES * size);
    for (;;) {
        at = under_way < LINES ? space + under_way++ * size : vq_wait(tx, &len);
        struct vbuf buf = {at, (u32)size, 0};
        vq_add(tx, &buf, 1, at);
        vq_kick(tx);
        if (spin) {
            while (!vq_reap(tx, &len))
                cpu_relax();
            under_way = 0;
        }
        if ((bytes += size) < next)
            continue;
        print("flood %lu MiB %lu ms\n", bytes >> 20, uptime_ms());
        next += step;
        if (last_round(bytes / step))
            return;
    }
}

static void echo(void)
{
    u8 *space = ram_alloc(BUFFERS * BUFFER), *at;
    u32 len;
    u64 bytes = 0;
    for (u32 i = 0; i < BUFFERS; i++) {
        struct vbuf buf = {space + i * BUFFER, BUFFER, 1};
        vq_add(rx, &buf, 1, buf.addr);
    }
    vq_kick(rx);
    do {
        at = vq_wait(rx, &len);
        struct vbuf out = {at, len, 0}, in = {at, BUFFER, 1};
        bytes += len;
        vq_add(tx, &out, 1, at);
        vq_kick(tx);
        vq_wait(tx, &len);
        vq_add(rx, &in, 1, at);
        vq_kick(rx);
    } while (!last_round(bytes));
}

void virtio_console(void)
{
    u32 port = (u32)opt_num("port", 0);
    if (!virtio_find(&dev, 3, 0))
        fail("there is no console device");
    virtio_negotiate(&dev, F_MULTIPORT);
    rx = vq_new(&dev, port ? 2 * port + 2 : 0, 0);
    tx = vq_new(&dev, port ? 2 * port + 3 : 1, 0);
    if (dev.features & F_MULTIPORT) {
        control_in = vq_new(&dev, 2, 0);
        control_out = vq_new(&dev, 3, 0);
    }
    virtio_ready(&dev);
    if (dev.features & F_MULTIPORT)
        open_port(port);
    print("virtio-console ready\n");
    const char *mode = opt("mode");
    if (mode && !strcmp(mode, "echo"))
        echo();
    else if (mode && !strcmp(mode, "flood"))
        flood();
    else
        lines();
}

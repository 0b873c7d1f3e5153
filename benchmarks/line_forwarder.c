/* A long cable between two network namespaces: IP packets come out of one end a while after they
 * went into the other, no faster than the line's rate.
 *
 *     line_forwarder NAMESPACE_A NAMESPACE_B BITS_PER_S DELAY_US QUEUE_BYTES
 *
 * Opens a tun device named "line" in each namespace (files under /run/netns) and says "ready".
 * It ends when its standard input does, and says "dropped N, busy S": packets that found the queue
 * full, and processor seconds used. Each direction has a thread, a rate and a queue of its own.
 *
 * The devices take and give TCP segments in bunches of up to 64 KB (TSO), as network cards do, so
 * that few packets cross this program although TCP counts segments of an ordinary size. A bunch is
 * charged as its segments would be: each with its own headers and OVERHEAD bytes of Ethernet.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#define OVERHEAD 38 /* preamble, header, checksum and gap of an Ethernet frame */
#define PACKET_MAX (65536 + 64)

struct packet {
    struct packet *next;
    int64_t due_ns;
    size_t size; /* with the virtio header */
    char bytes[];
};

struct direction {
    int from, to;
    int64_t bits_per_s, delay_ns;
    size_t queue_max;
    long dropped;
};

static void fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int open_end(const char *namespace) {
    char path[256];
    snprintf(path, sizeof path, "/run/netns/%s", namespace);
    int place = open(path, O_RDONLY);
    if (place < 0 || setns(place, CLONE_NEWNET) < 0)
        fail(path);
    close(place);
    int device = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
    if (device < 0)
        fail("/dev/net/tun");
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR};
    strcpy(request.ifr_name, "line");
    if (ioctl(device, TUNSETIFF, &request) < 0)
        fail("TUNSETIFF");
    if (ioctl(device, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4) < 0)
        fail("TUNSETOFFLOAD");
    return device;
}

/* Bytes that a packet, or the segments of a bunch, take of the line. A bunch is TCP over IPv4. */
static size_t charge(const unsigned char *bytes, size_t size) {
    const struct virtio_net_hdr *head = (const void *)bytes;
    const unsigned char *ip = bytes + sizeof *head;
    size_t packet = size - sizeof *head, segments = 1;
    if (head->gso_type != VIRTIO_NET_HDR_GSO_NONE && head->gso_size && packet >= 60) {
        size_t headers = 4 * (ip[0] & 15);
        headers += 4 * (ip[headers + 12] >> 4);
        if (packet > headers)
            segments = (packet - headers + head->gso_size - 1) / head->gso_size;
        packet += (segments - 1) * headers;
    }
    return packet + segments * OVERHEAD;
}

static void *carry(void *argument) {
    struct direction *d = argument;
    struct packet *first = NULL, **last = &first; /* on the way, in order */
    int64_t free_at = 0;
    static __thread unsigned char buffer[PACKET_MAX];
    prctl(PR_SET_TIMERSLACK, 1);
    for (;;) {
        int64_t now = now_ns();
        while (first && first->due_ns <= now) {
            struct packet *packet = first;
            first = packet->next;
            if (!first)
                last = &first;
            if (write(d->to, packet->bytes, packet->size) < 0 && errno != EINVAL && errno != EIO)
                d->dropped++;
            free(packet);
        }
        for (int i = 0; i < 16; i++) {
            ssize_t size = read(d->from, buffer, sizeof buffer);
            if (size <= 0)
                break;
            now = now_ns();
            size_t charged = charge(buffer, size);
            if (free_at < now)
                free_at = now;
            /* What waits for the line now, in bytes. */
            int64_t queued = (free_at - now) * d->bits_per_s / 8000000000LL;
            if (queued + (int64_t)charged > (int64_t)d->queue_max && queued > 0) {
                d->dropped++;
                continue;
            }
            free_at += (int64_t)charged * 8000000000LL / d->bits_per_s;
            struct packet *packet = malloc(sizeof *packet + size);
            if (!packet)
                fail("malloc");
            packet->next = NULL;
            packet->due_ns = free_at + d->delay_ns;
            packet->size = size;
            memcpy(packet->bytes, buffer, size);
            *last = packet;
            last = &packet->next;
        }
        now = now_ns();
        struct timespec wait, *limit = NULL;
        if (first) {
            int64_t ns = first->due_ns > now ? first->due_ns - now : 0;
            wait.tv_sec = ns / 1000000000LL;
            wait.tv_nsec = ns % 1000000000LL;
            limit = &wait;
        }
        struct pollfd ready = {.fd = d->from, .events = POLLIN};
        ppoll(&ready, 1, limit, NULL);
    }
    return NULL;
}

int main(int count, char **words) {
    if (count != 6) {
        fprintf(stderr, "line_forwarder NAMESPACE_A NAMESPACE_B BITS_PER_S DELAY_US QUEUE_BYTES\n");
        return 2;
    }
    int a = open_end(words[1]), b = open_end(words[2]);
    struct direction up = {a, b, atoll(words[3]), atoll(words[4]) * 1000LL, atoll(words[5]), 0};
    struct direction down = up;
    down.from = b, down.to = a;
    pthread_t threads[2];
    if (pthread_create(&threads[0], NULL, carry, &up) ||
        pthread_create(&threads[1], NULL, carry, &down))
        fail("pthread_create");
    printf("ready\n");
    fflush(stdout);
    char unused[64];
    while (read(0, unused, sizeof unused) > 0)
        ;
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    printf("dropped %ld, busy %.3f\n", up.dropped + down.dropped,
           used.ru_utime.tv_sec + used.ru_stime.tv_sec +
               1e-6 * (used.ru_utime.tv_usec + used.ru_stime.tv_usec));
    return 0;
}

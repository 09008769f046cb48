#include "layout.h"

#include <stddef.h>

#include "count.h"

/* Beyond these no network is, and below them no product of sizes here leaves an int64_t. */
enum { MOST_CHANNELS = 1 << 16, MOST_SIDE = 1 << 14, MOST_UNITS = 1 << 12, MOST_CLASSES = 1 << 22,
       MOST_INPUTS = 1 << 10, MOST_IMAGES = 1 << 6, LINE = 64 };

static int between(int64_t x, int64_t least, int64_t most) { return x >= least && x <= most; }

static int holds(Floats floats, int64_t count) {
    return floats.numbers ? floats.count == count : !count;
}

static int is_unit(const Unit *u) {
    int64_t kernel = u->kernel_size, lanes = blocks_of(u->out_channels) * LANES;
    if (!between(u->channels, 1, MOST_CHANNELS) || !between(u->out_channels, 1, MOST_CHANNELS))
        return 0;
    if ((kernel != 1 && kernel != 3) || !between(u->stride, 1, 2)) return 0;
    int halves = u->shortcut == POOL || u->shortcut == PROJECT;
    if (!between(u->shortcut, IDENTITY, PROJECT) || halves != (u->stride == 2)) return 0;
    int64_t channels = u->shortcut == REPEAT ? 2 * u->channels : u->channels;
    if (u->shortcut != PROJECT && channels != u->out_channels) return 0;
    int64_t projection = u->shortcut == PROJECT ? (u->channels + 1) * lanes : 0;
    return u->weight && u->whole &&
           u->weight_count == lanes * kernel * kernel * words_of(u->channels) &&
           u->whole_count == (kernel == 3 ? 16 : 1) * lanes && holds(u->vectors, 5 * lanes) &&
           holds(u->projection, projection);
}

int64_t tritonbnn_check_network(const Network *net) {
    int64_t kernel = net->stem_kernel_size, channels = net->stem_channels;
    if (!between(net->in_channels, 1, MOST_INPUTS) || !between(net->classes, 1, MOST_CLASSES) ||
        !between(channels, 1, MOST_CHANNELS) || !between(kernel, 1, 7) || kernel % 2 == 0 ||
        !between(net->stem_stride, 1, 2) || !between(net->stem_pools, 0, 1) ||
        !between(net->unit_count, 1, MOST_UNITS) || !net->units)
        return BAD_NETWORK;
    int64_t lanes = blocks_of(channels) * LANES;
    if (!holds(net->stem, (kernel * kernel * net->in_channels + 2) * lanes)) return BAD_NETWORK;
    for (int64_t i = 0; i < net->unit_count; i++) {
        if (net->units[i].channels != channels || !is_unit(&net->units[i])) return BAD_NETWORK;
        channels = net->units[i].out_channels;
    }
    int64_t heads = (net->classes + HEAD_LANES - 1) / HEAD_LANES * HEAD_LANES;
    return holds(net->head, (channels + 1) * heads) ? DONE : BAD_NETWORK;
}

/* Takes memory from a workspace, or only counts it. */
typedef struct {
    char *start;
    int64_t used;
} Memory;

static void *take(Memory *memory, int64_t bytes) {
    void *here = memory->start ? memory->start + memory->used : NULL;
    memory->used += (bytes + LINE - 1) / LINE * LINE;
    return here;
}

static int64_t map_bytes(const Unit *u, int64_t images, int64_t height, int64_t width) {
    int64_t pad = u->kernel_size / 2;
    int64_t words = images * (height + 2 * pad) * (width + 2 * pad) * words_of(u->channels);
    return (words * 4 + LINE - 1) / LINE * LINE;
}

static int keeps_memory(const Unit *u) { return u->shortcut == IDENTITY; }

enum { BUFFERS = 3 }; /* a unit that cannot work in place, and one behind it, need two more */

/* The bytes of each buffer of streams, of all maps, and of a thread's scratch. */
static int64_t measure(const Network *net, Layout *layout, int64_t buffers[BUFFERS]) {
    int64_t height = layout->first_height, width = layout->first_width, buffer = 0;
    int64_t n = layout->images;
    layout->map_bytes = layout->scratch_floats = 0;
    for (int b = 0; b < BUFFERS; b++) buffers[b] = 0;
    buffers[0] = n * height * width * blocks_of(net->stem_channels) * LANES * 4;
    for (int64_t i = 0; i < net->unit_count; i++) {
        const Unit *u = &net->units[i];
        if (u->stride == 2 && (height % 2 || width % 2)) return BAD_SIZE;
        layout->map_bytes += map_bytes(u, n, height, width);
        height /= u->stride;
        width /= u->stride;
        if (!keeps_memory(u)) buffer = (buffer + 1) % BUFFERS;
        int64_t bytes = n * height * width * blocks_of(u->out_channels) * LANES * 4;
        buffers[buffer] = larger(buffers[buffer], bytes);
        if (u->shortcut == PROJECT)
            layout->scratch_floats = larger(layout->scratch_floats, PIXELS * u->channels);
    }
    return height > 0 && width > 0 ? DONE : BAD_SIZE;
}

static void place(const Network *net, Layout *layout, float *const buffers[BUFFERS]) {
    int64_t height = layout->first_height, width = layout->first_width, buffer = 0;
    char *map = layout->maps;
    layout->first = buffers[0];
    layout->map = (uint32_t *)map;
    for (int64_t i = 0; i < net->unit_count; i++) {
        const Unit *u = &net->units[i];
        Placed *p = &layout->units[i];
        p->unit = u;
        p->height = height;
        p->width = width;
        p->words = words_of(u->channels);
        p->pitch = blocks_of(u->channels) * LANES;
        p->out_pitch = blocks_of(u->out_channels) * LANES;
        p->stream = buffers[buffer];
        p->map = (uint32_t *)map;
        map += map_bytes(u, layout->images, height, width);
        p->out_height = height /= u->stride;
        p->out_width = width /= u->stride;
        p->pixels = height * width;
        if (!keeps_memory(u)) buffer = (buffer + 1) % BUFFERS;
        layout->last = p->out = buffers[buffer];
        layout->last_pixels = height * width;
        layout->last_pitch = p->out_pitch;
        p->next = i + 1 < net->unit_count ? (uint32_t *)map : NULL;
        p->next_words = words_of(u->out_channels);
        p->next_pad = i + 1 < net->unit_count ? net->units[i + 1].kernel_size / 2 : 0;
    }
}

int64_t tritonbnn_lay_out(const Network *net, int64_t height, int64_t width, int64_t images,
                          int64_t threads, char *workspace, Layout *layout) {
    if (!between(height, 1, MOST_SIDE) || !between(width, 1, MOST_SIDE) ||
        !between(images, 1, MOST_IMAGES))
        return BAD_SIZE;
    int64_t pad = net->stem_kernel_size / 2, buffers[BUFFERS];
    layout->images = images;
    layout->pad = pad;
    layout->first_height = layout->stem_height = (height - 1) / net->stem_stride + 1;
    layout->first_width = layout->stem_width = (width - 1) / net->stem_stride + 1;
    if (net->stem_pools) {
        layout->first_height = (layout->stem_height - 1) / 2 + 1;
        layout->first_width = (layout->stem_width - 1) / 2 + 1;
    }
    if (measure(net, layout, buffers) != DONE) return BAD_SIZE;
    Memory memory = {workspace, 0};
    int64_t raw = images * layout->stem_height * layout->stem_width *
                  blocks_of(net->stem_channels) * LANES * 4;
    float *streams[BUFFERS];
    layout->padded = take(&memory, images * (height + 2 * pad) * (width + 2 * pad) *
                                       net->in_channels * 4);
    layout->raw = take(&memory, net->stem_pools ? raw : 0);
    for (int b = 0; b < BUFFERS; b++) streams[b] = take(&memory, buffers[b]);
    const Unit *final = &net->units[net->unit_count - 1];
    layout->features = take(&memory, images * blocks_of(final->out_channels) * LANES * 4);
    layout->maps = take(&memory, layout->map_bytes);
    layout->scratch = take(&memory, threads * layout->scratch_floats * 4);
    layout->units = take(&memory, net->unit_count * (int64_t)sizeof(Placed));
    layout->bytes = memory.used;
    if (!workspace) return DONE;
    place(net, layout, streams);
    if (!net->stem_pools) layout->raw = layout->first;
    return DONE;
}

#include "layout.h"

#include <stddef.h>

#include "count.h"

/* Beyond these no network is, and below them no product of sizes here leaves an int64_t. */
enum { MOST_CHANNELS = 1 << 16, MOST_SIDE = 1 << 14, MOST_UNITS = 1 << 12, MOST_CLASSES = 1 << 22,
       MOST_INPUTS = 1 << 10, MOST_IMAGES = 1 << 6, LINE = 64 };

enum {
    CHUNK_BYTES = 1 << 14,         /* of a chunk's stream at least, and it stays in a first cache */
    FLOW_STREAM_BYTES = 3 << 17,   /* a stream that is smaller stays in a second cache anyway */
    FLOW_WEIGHT_BYTES = 160 << 10  /* of all units that flow: they stay there too */
};

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
    return u->weight && u->weight_count == lanes * kernel * kernel * words_of(u->channels) &&
           holds(u->whole, (kernel == 3 ? 16 : 1) * lanes) && holds(u->vectors, 5 * lanes) &&
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

static int64_t stream_bytes(int64_t rows, int64_t width, int64_t channels) {
    return rows * width * blocks_of(channels) * LANES * 4;
}

static int works_in_place(const Unit *u) { return u->shortcut == IDENTITY; }

int64_t tritonbnn_group_end(const Network *net, int64_t first) {
    int64_t last = first + 1;
    while (last < net->unit_count && net->units[last].kernel_size == 1 &&
           net->units[last].stride == 1)
        last++;
    return last;
}

int64_t tritonbnn_chunk_pixels(const Unit *u) {
    int64_t weight = 4 * u->weight_count, pixel = stream_bytes(1, 1, u->out_channels);
    int64_t pixels = larger(CHUNK_BYTES, weight) / pixel / PIXELS * PIXELS;
    return smaller(CHUNK, larger(PIXELS, pixels));
}

static int64_t chunk_rows(const Unit *u, int64_t width) {
    return larger(1, tritonbnn_chunk_pixels(u) / larger(1, width));
}

/* How many of the first units flow: whole groups, as long as streams are too large for the second
   cache, and all their weights are not. */
static int64_t count_flowing(const Network *net, int64_t images, int64_t height, int64_t width) {
    int64_t weights = 0, first = 0;
    for (int64_t groups = 0; first < net->unit_count && groups < MOST_GROUPS; groups++) {
        int64_t last = tritonbnn_group_end(net, first), bytes = 0;
        for (int64_t i = first; i < last; i++) {
            const Unit *u = &net->units[i];
            bytes = larger(bytes, stream_bytes(images * height, width, u->channels));
            height /= u->stride;
            width /= u->stride;
            weights += 4 * u->weight_count;
            bytes = larger(bytes, stream_bytes(images * height, width, u->out_channels));
        }
        if (bytes < FLOW_STREAM_BYTES || weights > FLOW_WEIGHT_BYTES) break;
        first = last;
    }
    return first;
}

/* The rows of a stream that must be in memory at once. It is opened by unit `opener`, or by the
   stem if that is -1; height, width are its own.

   A group computes chunk after chunk, and the one before it is never ahead by more than its own
   chunk and what this chunk reads. So the rows of all groups that work on the stream add up. */
static int64_t rows_at_once(const Network *net, const Layout *layout, int64_t opener,
                            int64_t height, int64_t width) {
    int64_t all = layout->images * height, i = opener + 1;
    if (i > layout->flowing || !layout->flowing) return all;
    int64_t rows = opener < 0 ? layout->stem_chunk_rows : chunk_rows(&net->units[opener], width);
    int in_group = opener >= 0; /* whether the units at i are of the opener's own group */
    while (i < layout->flowing) {
        const Unit *u = &net->units[i];
        int64_t end = tritonbnn_group_end(net, i);
        if (in_group && u->kernel_size == 1 && u->stride == 1)
            end = i + 1; /* it takes the opener's chunk */
        else
            rows += chunk_rows(u, width / u->stride) * u->stride + u->kernel_size / 2 + 1;
        int stays = 1;
        for (; i < end && stays; i++) stays = works_in_place(&net->units[i]);
        if (!stays) return smaller(all, (rows + 3) / 2 * 2); /* even: a pool reads two as one */
    }
    return all; /* what does not flow reads it */
}

enum { ROTATING = 3, MOST_BUFFERS = ROTATING + 2 * MOST_GROUPS + 1 };

/* The walk through a network's units: what is known of the next one before it has memory. */
typedef struct {
    const Network *net;
    const Layout *layout;
    int64_t index, buffer, rows, height, width;              /* of its input */
    int64_t out_buffer, out_rows, out_height, out_width;     /* and of its output */
    int64_t opened; /* buffers of streams that flow */
} Walk;

static void look_at_unit(Walk *w) {
    if (w->index >= w->net->unit_count) return;
    const Unit *u = &w->net->units[w->index];
    w->out_height = w->height / u->stride;
    w->out_width = w->width / u->stride;
    w->out_buffer = w->buffer;
    w->out_rows = w->rows;
    if (works_in_place(u)) return;
    w->out_rows = rows_at_once(w->net, w->layout, w->index, w->out_height, w->out_width);
    if (w->index < w->layout->flowing && w->opened < MOST_BUFFERS - ROTATING)
        w->out_buffer = ROTATING + w->opened++;
    else /* a unit that cannot work in place, and one behind it, need two more */
        w->out_buffer = (w->buffer + 1) % ROTATING;
}

static Walk start_walk(const Network *net, const Layout *layout, int64_t width) {
    Walk w = {.net = net, .layout = layout, .height = layout->first_height, .width = width};
    w.rows = net->stem_pools ? layout->images * w.height
                             : rows_at_once(net, layout, -1, w.height, w.width);
    if (layout->flowing) w.buffer = ROTATING + w.opened++;
    look_at_unit(&w);
    return w;
}

static void step(Walk *w) {
    w->index++;
    w->buffer = w->out_buffer;
    w->rows = w->out_rows;
    w->height = w->out_height;
    w->width = w->out_width;
    look_at_unit(w);
}

/* The bytes of each buffer of streams, of all maps, and of a thread's scratch. */
static int64_t measure(Layout *layout, Walk w, int64_t buffers[MOST_BUFFERS]) {
    layout->map_bytes = layout->scratch_floats = 0;
    for (int b = 0; b < MOST_BUFFERS; b++) buffers[b] = 0;
    buffers[w.buffer] = stream_bytes(w.rows, w.width, w.net->stem_channels);
    for (; w.index < w.net->unit_count; step(&w)) {
        const Unit *u = &w.net->units[w.index];
        if (u->stride == 2 && (w.height % 2 || w.width % 2)) return BAD_SIZE;
        layout->map_bytes += map_bytes(u, layout->images, w.height, w.width);
        int64_t bytes = stream_bytes(w.out_rows, w.out_width, u->out_channels);
        buffers[w.out_buffer] = larger(buffers[w.out_buffer], bytes);
        if (u->shortcut == PROJECT)
            layout->scratch_floats =
                larger(layout->scratch_floats, PIXELS * blocks_of(u->channels) * LANES);
    }
    return w.height > 0 && w.width > 0 ? DONE : BAD_SIZE;
}

static Stream make_stream(float *numbers, int64_t rows, int64_t width) {
    return (Stream){numbers, rows, width, rows * width * LANES};
}

static void place(Layout *layout, Walk w, float *const buffers[MOST_BUFFERS]) {
    const Network *net = w.net;
    char *map = layout->maps;
    layout->first = make_stream(buffers[w.buffer], w.rows, w.width);
    layout->map = (uint32_t *)map;
    for (; w.index < net->unit_count; step(&w)) {
        const Unit *u = &net->units[w.index];
        Placed *p = &layout->units[w.index];
        map += map_bytes(u, layout->images, w.height, w.width);
        *p = (Placed){
            .unit = u,
            .height = w.height,
            .width = w.width,
            .out_height = w.out_height,
            .out_width = w.out_width,
            .words = words_of(u->channels),
            .chunk_rows = chunk_rows(u, w.out_width),
            .blocks = blocks_of(u->out_channels),
            .in = make_stream(buffers[w.buffer], w.rows, w.width),
            .out = make_stream(buffers[w.out_buffer], w.out_rows, w.out_width),
            .map = (uint32_t *)(map - map_bytes(u, layout->images, w.height, w.width)),
            .next_words = words_of(u->out_channels),
        };
        if (w.index + 1 < net->unit_count) {
            p->next = (uint32_t *)map;
            p->next_pad = net->units[w.index + 1].kernel_size / 2;
        }
        layout->last = p->out;
        layout->last_pixels = w.out_height * w.out_width;
    }
}

int64_t tritonbnn_lay_out(const Network *net, int64_t height, int64_t width, int64_t images,
                          int64_t threads, char *workspace, Layout *layout) {
    if (!between(height, 1, MOST_SIDE) || !between(width, 1, MOST_SIDE) ||
        !between(images, 1, MOST_IMAGES))
        return BAD_SIZE;
    int64_t pad = net->stem_kernel_size / 2, buffers[MOST_BUFFERS];
    layout->images = images;
    layout->pad = pad;
    layout->first_height = layout->stem_height = (height - 1) / net->stem_stride + 1;
    int64_t first_width = layout->stem_width = (width - 1) / net->stem_stride + 1;
    if (net->stem_pools) {
        layout->first_height = (layout->stem_height - 1) / 2 + 1;
        first_width = (layout->stem_width - 1) / 2 + 1;
    }
    layout->stem_chunk_rows = larger(1, CHUNK / first_width);
    layout->flowing =
        threads > 1 ? 0 : count_flowing(net, images, layout->first_height, first_width);
    Walk walk = start_walk(net, layout, first_width);
    if (measure(layout, walk, buffers) != DONE) return BAD_SIZE;
    Memory memory = {workspace, 0};
    int64_t raw = stream_bytes(images * layout->stem_height, layout->stem_width, net->stem_channels);
    float *streams[MOST_BUFFERS];
    layout->padded = take(&memory, images * (height + 2 * pad) * (width + 2 * pad) *
                                       net->in_channels * 4);
    layout->raw = take(&memory, net->stem_pools ? raw : 0);
    for (int b = 0; b < MOST_BUFFERS; b++) streams[b] = take(&memory, buffers[b]);
    layout->maps = take(&memory, layout->map_bytes);
    layout->scratch = take(&memory, threads * layout->scratch_floats * 4);
    layout->units = take(&memory, net->unit_count * (int64_t)sizeof(Placed));
    layout->bytes = memory.used;
    if (workspace) place(layout, walk, streams);
    return DONE;
}

/* Run a packed network: every unit of a group of images in turn, a chunk of pixels at a time.

   A unit adds its shortcut to (sum of products) * scale + constant, where the sum is a whole number
   that is computed exactly. A PReLU follows, and the signs of what comes next. */
#include "engine.h"

#include <stddef.h>

#include "count.h"
#include "ends.h"
#include "layout.h"
#include "real.h"

enum {
    GROUP_BYTES = 1 << 20,  /* of the largest stream of a group of images, or one image */
    GROUP_IMAGES = 64,
    MOST_BYTES = 1 << 30,   /* of all images' means over pixels */
    FEW_TILES = 4           /* of a thread: with fewer, channels are parted instead of pixels */
};

/* What one output pixel reads and writes, as places in the unit's arrays. */
typedef struct {
    int64_t input, shortcut, out, next, kind;
} Spot;

INLINE int64_t place_in(const Stream *stream, int64_t row) {
    return row % stream->rows * stream->width * LANES;
}

/* Pixels from..to of a row of the output. */
static void find_spots_of_row(const Placed *u, int64_t row, int64_t from, int64_t to, Spot *spots) {
    int64_t kernel = u->unit->kernel_size, pad = kernel / 2, stride = u->unit->stride;
    int64_t image = row / u->out_height, y = row % u->out_height;
    int64_t map_line = image * (u->height + 2 * pad) + y * stride;
    int64_t next_line = image * (u->out_height + 2 * u->next_pad) + y + u->next_pad;
    int64_t input = map_line * (u->width + 2 * pad) * u->words;
    int64_t shortcut = place_in(&u->in, image * u->height + y * stride);
    int64_t out = place_in(&u->out, row);
    int64_t next = (next_line * (u->out_width + 2 * u->next_pad) + u->next_pad) * u->next_words;
    int64_t cut_rows = (y * stride < pad) | (y * stride + pad >= u->height) << 1;
    for (int64_t x = from; x < to; x++) {
        int64_t cut_columns = (x * stride < pad) | (x * stride + pad >= u->width) << 1;
        *spots++ = (Spot){
            .input = input + x * stride * u->words,
            .shortcut = shortcut + x * stride * LANES,
            .out = out + x * LANES,
            .next = next + x * u->next_words,
            .kind = kernel == 3 ? cut_rows * 4 + cut_columns : 0,
        };
    }
}

static void find_spots(const Placed *u, int64_t from, int64_t to, Spot *spots) {
    int64_t row = from / u->out_width, x = from % u->out_width;
    for (int64_t left = to - from; left > 0; row++, x = 0) {
        int64_t count = smaller(left, u->out_width - x);
        find_spots_of_row(u, row, x, x + count, spots);
        spots += count;
        left -= count;
    }
}

/* The channels twice, where they meet within a block. */
INLINE vec repeated(const float *pixel, int64_t plane, int64_t channels, int64_t first) {
    vec both = splat(0);
    for (int64_t i = 0; i < LANES && first + i < 2 * channels; i++) {
        int64_t c = first + i < channels ? first + i : first + i - channels;
        both[i] = pixel[c / LANES * plane + c % LANES];
    }
    return both;
}

INLINE vec mean_of_four(const float *corner, int64_t row) {
    vec sum = load(corner) + load(corner + LANES);
    sum += load(corner + row);
    return (sum + load(corner + row + LANES)) * 0.25f;
}

enum { REPEAT_WITHIN = PROJECT + 1 }; /* REPEAT, where a block may hold both */

/* At most PIXELS outputs of a block of channels. */
INLINE void tile_of(const Placed *u, int64_t shortcut, const Spot *spots, int64_t count,
                 int64_t block) {
    const Unit *unit = u->unit;
    int64_t kernel = unit->kernel_size, run = kernel * u->words, lanes = u->blocks * LANES;
    int64_t map_row = (u->width + 2 * (kernel / 2)) * u->words, first = block * LANES;
    const uint32_t *inputs[PIXELS];
    ivec counts[PIXELS] = {{0}};
    for (int64_t p = 0; p < PIXELS; p++) inputs[p] = u->map + spots[smaller(p, count - 1)].input;
    const uint32_t *weight = unit->weight + block * kernel * run * LANES;
    if (count > PIXELS / 2)
        count_different(weight, inputs, kernel, run, map_row, PIXELS, counts);
    else if (count > 1)
        count_different(weight, inputs, kernel, run, map_row, PIXELS / 2, counts);
    else
        count_different(weight, inputs, kernel, run, map_row, 1, counts);
    const float *vectors = unit->vectors.numbers + first, *stream = u->in.numbers;
    const float *whole = unit->whole.numbers + first;
    vec scale = load(vectors), constant = load(vectors + lanes), slope = load(vectors + 2 * lanes);
    vec shift_out = load(vectors + 3 * lanes), threshold = load(vectors + 4 * lanes);
    int64_t channels = unit->channels, row = u->width * LANES;
    int64_t source = shortcut == REPEAT && first >= channels ? first - channels : first;
    if (shortcut != REPEAT_WITHIN) stream += source / LANES * u->in.plane;
    float *stream_out = u->out.numbers + block * u->out.plane;
    char *next = u->next ? (char *)u->next + 2 * block : NULL;
    vec z[PIXELS] = {{0}};
#pragma GCC unroll 8
    for (int64_t p = 0; p < count; p++) {
        const float *from = stream + spots[p].shortcut;
        /* whole numbers below 2^24, so exact in floats */
        vec sum = load(whole + spots[p].kind * lanes) - 2 * __builtin_convertvector(counts[p], vec);
        vec t = sum * scale + constant;
        if (shortcut == IDENTITY || shortcut == REPEAT)
            t += load(from);
        else if (shortcut == REPEAT_WITHIN)
            t += repeated(from, u->in.plane, channels, first);
        else if (shortcut == POOL)
            t += mean_of_four(from, row);
        else /* PROJECT has left it there */
            t += load(stream_out + spots[p].out);
        z[p] = prelu(t, slope) + shift_out;
    }
#pragma GCC unroll 8
    for (int64_t p = 0; p < count; p++) store(stream_out + spots[p].out, z[p]);
    if (!next) return;
#pragma GCC unroll 8
    for (int64_t p = 0; p < count; p++) {
        uint16_t bits = at_least(z[p], threshold);
        memcpy(next + 4 * spots[p].next, &bits, 2);
    }
}

INLINE void tile(const Placed *u, int64_t shortcut, const Spot *spots, int64_t count,
                 int64_t block) {
    if (count == PIXELS)
        tile_of(u, shortcut, spots, PIXELS, block);
    else
        tile_of(u, shortcut, spots, count, block);
}

static void tiles(const Placed *u, const Spot *spots, int64_t from, int64_t to, int64_t block) {
    const Unit *unit = u->unit;
    int64_t shortcut = unit->shortcut, words = unit->kernel_size * unit->kernel_size * u->words;
    const char *weight = (const char *)(unit->weight + block * words * LANES);
    if (shortcut == REPEAT && unit->channels % LANES) shortcut = REPEAT_WITHIN;
    int64_t ahead = block + 1 < u->blocks ? words : 0; /* of the next block, in lines */
    int64_t part = (ahead * PIXELS + to - from - 1) / (to - from), line = 0;
    for (int64_t pixel = from; pixel < to; pixel += PIXELS, spots += PIXELS) {
        int64_t count = smaller(PIXELS, to - pixel);
        for (int64_t last = smaller(line + part, ahead); line < last; line++)
            __builtin_prefetch(weight + (ahead + line) * LANES * 4, 0, 2);
        switch (shortcut) { /* constants: each loop is compiled for one of them */
        case IDENTITY: tile(u, IDENTITY, spots, count, block); break;
        case REPEAT: tile(u, REPEAT, spots, count, block); break;
        case REPEAT_WITHIN: tile(u, REPEAT_WITHIN, spots, count, block); break;
        case POOL: tile(u, POOL, spots, count, block); break;
        default: tile(u, PROJECT, spots, count, block);
        }
    }
}

/* The 2 x 2 means times a real 1 x 1 convolution, into the output. scratch: PIXELS pixels. */
static void project(const Placed *u, const Spot *spots, int64_t from, int64_t to,
                    int64_t first_block, int64_t last_block, float *scratch) {
    int64_t channels = u->unit->channels, row = u->width * LANES;
    const float *weight = u->unit->projection.numbers;
    for (int64_t pixel = from; pixel < to; pixel += REAL_PIXELS, spots += REAL_PIXELS) {
        int64_t count = smaller(REAL_PIXELS, to - pixel);
        const float *inputs[REAL_PIXELS];
        for (int64_t p = 0; p < REAL_PIXELS; p++) {
            float *mean = scratch + smaller(p, count - 1) * blocks_of(channels) * LANES;
            inputs[p] = mean;
            if (p >= count) continue;
            const float *corner = u->in.numbers + spots[p].shortcut;
            for (int64_t c = 0; c < channels; c += LANES, corner += u->in.plane)
                store(mean + c, mean_of_four(corner, row));
        }
        for (int64_t block = first_block; block < last_block; block++) {
            vec sums[REAL_PIXELS];
            real_product(weight + block * channels * LANES, inputs, 1, channels, 0, sums);
            vec offset = load(weight + (u->blocks * channels + block) * LANES);
            for (int64_t p = 0; p < count; p++)
                store(u->out.numbers + block * u->out.plane + spots[p].out, sums[p] + offset);
        }
    }
}

/* Some pixels of a unit, in some of its blocks of channels. */
static void chunk(const Placed *u, int64_t from, int64_t to, int64_t first_block,
                  int64_t last_block, float *scratch) {
    Spot spots[CHUNK];
    find_spots(u, from, to, spots);
    if (u->unit->shortcut == PROJECT)
        project(u, spots, from, to, first_block, last_block, scratch);
    for (int64_t block = first_block; block < last_block; block++)
        tiles(u, spots, from, to, block);
}

/* A thread's place among those that run a group together. */
typedef struct {
    int64_t index, count;
    void (*barrier)(void);
} Member;

static void meet(Member member) {
    if (member.count > 1) member.barrier();
}

/* A member's share of so many things. */
static int64_t share(Member member, int64_t things, int64_t past) {
    return things * (member.index + past) / member.count;
}

/* Some pixels of all units of a group. */
static void group_chunk(const Layout *layout, int64_t first, int64_t last, int64_t from, int64_t to,
                        float *scratch) {
    int64_t step = tritonbnn_chunk_pixels(layout->units[first].unit);
    for (int64_t at = from; at < to; at += step)
        for (int64_t i = first; i < last; i++) {
            const Placed *u = &layout->units[i];
            chunk(u, at, smaller(at + step, to), 0, u->blocks, scratch);
        }
}

/* All units from `first` on, one group after the other. */
static void run_units(const Network *net, const Layout *layout, int64_t first, int64_t images,
                      Member member) {
    float *scratch = layout->scratch + member.index * layout->scratch_floats;
    for (int64_t i = first; i < net->unit_count;) {
        const Placed *u = &layout->units[i];
        int64_t last = tritonbnn_group_end(net, i), pixels = images * u->out_height * u->out_width;
        int64_t count = (pixels + PIXELS - 1) / PIXELS;
        if (member.count > 1 && count < FEW_TILES * member.count) {
            for (int64_t at = 0; at < pixels; at += CHUNK)
                chunk(u, at, smaller(at + CHUNK, pixels), share(member, u->blocks, 0),
                      share(member, u->blocks, 1), scratch);
            i++;
        } else {
            group_chunk(layout, i, last, share(member, count, 0) * PIXELS,
                        smaller(share(member, count, 1) * PIXELS, pixels), scratch);
            i = last;
        }
        meet(member);
    }
}

/* Groups of units that flow: each is computed a few rows at a time, when the next one needs them.
   Their streams stay in a near cache then. */
typedef struct {
    const Network *net;
    const Call *call;
    const Layout *layout;
    int64_t images;
    int64_t first[MOST_GROUPS + 1]; /* unit of each group */
    int64_t done[MOST_GROUPS];      /* rows of its output */
    int64_t stem_done;
} Flow;

/* Rows of the input, of all images, that the rows before `to` of a unit's output are made of. */
static int64_t rows_needed(const Placed *u, int64_t to) {
    int64_t image = (to - 1) / u->out_height, y = (to - 1) % u->out_height;
    int64_t stride = u->unit->stride, below = larger(u->unit->kernel_size / 2, stride - 1);
    return image * u->height + smaller(u->height, y * stride + below + 1);
}

static void flow_to(Flow *flow, int64_t group, int64_t rows) {
    const Layout *layout = flow->layout;
    if (group < 0) {
        int64_t all = flow->images * layout->first_height;
        while (flow->stem_done < rows) {
            int64_t to = smaller(flow->stem_done + layout->stem_chunk_rows, all);
            stem_rows(flow->net, flow->call, layout, flow->stem_done, to);
            flow->stem_done = to;
        }
        return;
    }
    const Placed *u = &layout->units[flow->first[group]];
    int64_t all = flow->images * u->out_height;
    while (flow->done[group] < rows) {
        int64_t from = flow->done[group], to = smaller(from + u->chunk_rows, all);
        flow_to(flow, group - 1, rows_needed(u, to));
        group_chunk(layout, flow->first[group], flow->first[group + 1], from * u->out_width,
                    to * u->out_width, layout->scratch);
        flow->done[group] = to;
    }
}

/* The stem, unless its output is pooled, and the units that flow. */
static void run_flow(const Network *net, const Call *call, const Layout *layout, int64_t images) {
    Flow flow = {.net = net, .call = call, .layout = layout, .images = images};
    int64_t groups = 0;
    if (net->stem_pools) flow.stem_done = images * layout->first_height;
    while (flow.first[groups] < layout->flowing) {
        flow.first[groups + 1] = tritonbnn_group_end(net, flow.first[groups]);
        groups++;
    }
    const Placed *last = &layout->units[layout->flowing - 1];
    flow_to(&flow, groups - 1, images * last->out_height);
}

/* Images from `first` on. Returns whether all numbers that this member saw were finite. */
static int run_group(const Network *net, const Call *call, const Layout *layout, float *features,
                     int64_t first, int64_t images, Member member) {
    int64_t rows = images * (call->height + 2 * layout->pad);
    int finite = prepare_rows(net, call, layout, first, share(member, rows, 0),
                              share(member, rows, 1));
    int64_t bytes = layout->map_bytes, start = share(member, bytes, 0);
    memset(layout->maps + start, 0, share(member, bytes, 1) - start);
    meet(member);
    if (net->stem_pools || !layout->flowing) {
        rows = images * layout->stem_height;
        stem_rows(net, call, layout, share(member, rows, 0), share(member, rows, 1));
        meet(member);
    }
    if (net->stem_pools) {
        rows = images * layout->first_height;
        pool_rows(net, layout, share(member, rows, 0), share(member, rows, 1));
        meet(member);
    }
    if (layout->flowing) run_flow(net, call, layout, images);
    run_units(net, layout, layout->flowing, images, member);
    int64_t blocks = layout->units[net->unit_count - 1].blocks, means = images * blocks;
    average(net, layout, features + first * blocks * LANES, share(member, means, 0),
            share(member, means, 1));
    meet(member); /* before the next group overwrites what others still read */
    return finite;
}

/* How the images of a call are parted. */
typedef struct {
    int apart;      /* each thread runs images of its own, else all run the same together */
    int64_t images; /* of a group */
} Plan;

static int64_t make_plan(const Network *net, const Call *call, Plan *plan) {
    Layout one;
    if (call->image_count < 1 || call->threads < 1) return BAD_SIZE;
    int64_t code = tritonbnn_lay_out(net, call->height, call->width, 1, 1, NULL, &one);
    if (code != DONE) return code;
    int64_t own = call->image_count / call->threads;
    plan->apart = call->threads == 1 || (own >= 1 && call->image_count % call->threads == 0) ||
                  own >= 4;
    int64_t fitting = larger(1, smaller(GROUP_IMAGES, GROUP_BYTES / one.bytes));
    int64_t most = plan->apart ? (call->image_count + call->threads - 1) / call->threads
                               : call->image_count;
    plan->images = smaller(fitting, most);
    return DONE;
}

/* Of an image's means over pixels. */
static int64_t feature_bytes(const Network *net) {
    return blocks_of(net->units[net->unit_count - 1].out_channels) * LANES * 4;
}

/* Whether images and logits have the numbers that the network takes and gives. */
static int counts_fit(const Network *net, const Call *call) {
    int64_t plane = call->height * call->width * net->in_channels; /* each is known to be small */
    int bytes = call->bytes_a_number == 1;
    return (bytes || call->bytes_a_number == 4) &&
           call->number_count / plane == call->image_count && call->number_count % plane == 0 &&
           call->logit_count == call->image_count * net->classes && call->images && call->logits &&
           call->table.count == (bytes ? net->in_channels * 256 : 0);
}

EXPORT int64_t tritonbnn_engine_workspace(const Network *net, const Call *call) {
    Plan plan;
    Layout layout;
    if (tritonbnn_check_network(net) != DONE) return -BAD_NETWORK;
    int64_t code = make_plan(net, call, &plan);
    if (code == DONE)
        code = tritonbnn_lay_out(net, call->height, call->width, plan.images,
                                 plan.apart ? 1 : call->threads, NULL, &layout);
    if (code != DONE) return -code;
    if (call->image_count > MOST_BYTES / feature_bytes(net)) return -BAD_SIZE;
    if (!counts_fit(net, call)) return -BAD_NETWORK;
    return layout.bytes * (plan.apart ? call->threads : 1) +
           call->image_count * feature_bytes(net);
}

typedef struct {
    const Network *net;
    const Call *call;
    Plan plan;
    float *features; /* [image][channel] of all images, at the workspace's start */
    char *workspace; /* behind them */
    int64_t bytes;   /* of a thread's own workspace */
    Layout shared; /* of all threads, where they run the same images together */
    int finite;    /* set to 0 by whoever finds it so */
} Work;

static void run_member(Work *work, Member member) {
    const Network *net = work->net;
    const Call *call = work->call;
    int64_t first = 0, last = call->image_count, step = work->plan.images;
    Layout own, *layout = &work->shared;
    if (work->plan.apart) {
        first = share(member, call->image_count, 0);
        last = share(member, call->image_count, 1);
        tritonbnn_lay_out(net, call->height, call->width, step, 1,
                          work->workspace + member.index * work->bytes, &own);
        layout = &own;
        member = (Member){0, 1, NULL};
    }
    int finite = 1;
    for (int64_t at = first; at < last; at += step)
        finite &= run_group(net, call, layout, work->features, at, smaller(step, last - at), member);
    int64_t heads = (net->classes + HEAD_LANES - 1) / HEAD_LANES;
    classify(net, work->features + first * feature_bytes(net) / 4,
             call->logits + first * net->classes, last - first, share(member, heads, 0),
             share(member, heads, 1));
    if (!finite) __atomic_store_n(&work->finite, 0, __ATOMIC_RELAXED);
}

static void run_in_team(void *of) {
    Work *work = of;
    const Team *team = &work->call->team;
    run_member(work, (Member){team->member(), team->members(), team->barrier});
}

EXPORT int64_t tritonbnn_engine_run(const Network *net, const Call *call) {
    int64_t bytes = tritonbnn_engine_workspace(net, call);
    if (bytes < 0) return -bytes;
    if (call->workspace_bytes < bytes || !call->workspace) return SMALL_WORKSPACE;
    Work work = {.net = net, .call = call, .finite = 1};
    make_plan(net, call, &work.plan);
    int64_t means = call->image_count * feature_bytes(net);
    work.features = (float *)call->workspace;
    work.workspace = call->workspace + means;
    work.bytes = (bytes - means) / (work.plan.apart ? call->threads : 1);
    if (!work.plan.apart)
        tritonbnn_lay_out(net, call->height, call->width, work.plan.images, call->threads,
                          work.workspace, &work.shared);
    if (call->threads > 1 && call->team.parallel)
        call->team.parallel(run_in_team, &work, (unsigned)call->threads, 0);
    else
        run_member(&work, (Member){0, 1, NULL});
    return work.finite ? DONE : NOT_FINITE;
}

/* Run a packed network: every unit of a group of images in turn, a chunk of pixels at a time.

   A unit adds its shortcut to (sum of products) * scale + constant, where the sum is a whole number
   that is computed exactly. A PReLU follows, and the signs of what comes next. */
#include "engine.h"

#include <stddef.h>

#include "count.h"
#include "ends.h"
#include "layout.h"
#include "real.h"

EXPORT const int64_t tritonbnn_abi = TRITONBNN_ABI;
EXPORT const char tritonbnn_isa[] = TRITONBNN_ISA;

enum {
    CHUNK = 128,            /* pixels of a chunk at most: its streams stay in the second cache */
    GROUP_BYTES = 1 << 20,  /* of the largest stream of a group of images, or one image */
    GROUP_IMAGES = 64,
    FEW_TILES = 4           /* of a thread: with fewer, channels are parted instead of pixels */
};

/* What one output pixel reads and writes, as places in the unit's arrays. */
typedef struct {
    int64_t input, shortcut, next, kind;
} Spot;

static void find_spots(const Placed *u, int64_t from, int64_t to, Spot *spots) {
    int64_t kernel = u->unit->kernel_size, pad = kernel / 2, stride = u->unit->stride;
    int64_t map_width = u->width + 2 * pad, map_height = u->height + 2 * pad;
    int64_t next_width = u->out_width + 2 * u->next_pad;
    int64_t next_height = u->out_height + 2 * u->next_pad;
    int64_t x = from % u->out_width, row = from / u->out_width;
    int64_t y = row % u->out_height, image = row / u->out_height;
    for (int64_t i = from; i < to; i++, spots++) {
        int64_t line = image * map_height + y * stride;
        int64_t cut_rows = (y * stride < pad) | (y * stride + pad >= u->height) << 1;
        int64_t cut_columns = (x * stride < pad) | (x * stride + pad >= u->width) << 1;
        spots->input = (line * map_width + x * stride) * u->words;
        spots->shortcut = ((image * u->height + y * stride) * u->width + x * stride) * u->pitch;
        line = image * next_height + y + u->next_pad;
        spots->next = (line * next_width + x + u->next_pad) * u->next_words;
        spots->kind = kernel == 3 ? cut_rows * 4 + cut_columns : 0;
        if (++x < u->out_width) continue;
        x = 0;
        if (++y < u->out_height) continue;
        y = 0;
        image++;
    }
}

/* The channels twice: they may meet within a block. */
INLINE vec repeated(const float *pixel, int64_t channels, int64_t first) {
    if (first + LANES <= channels) return load(pixel + first);
    if (first >= channels && channels % LANES == 0) return load(pixel + first - channels);
    vec both = splat(0);
    for (int64_t i = 0; i < LANES && first + i < 2 * channels; i++)
        both[i] = pixel[first + i < channels ? first + i : first + i - channels];
    return both;
}

INLINE vec mean_of_four(const float *corner, int64_t pitch, int64_t row) {
    vec sum = load(corner) + load(corner + pitch);
    sum += load(corner + row);
    return (sum + load(corner + row + pitch)) * 0.25f;
}

/* At most PIXELS outputs of a block of channels. */
INLINE void tile(const Placed *u, int64_t shortcut, const Spot *spots, int64_t pixel, int64_t count,
                 int64_t block) {
    const Unit *unit = u->unit;
    int64_t kernel = unit->kernel_size, run = kernel * u->words, lanes = u->out_pitch;
    int64_t map_row = (u->width + 2 * (kernel / 2)) * u->words, first = block * LANES;
    const uint32_t *inputs[PIXELS];
    ivec counts[PIXELS];
    for (int64_t p = 0; p < PIXELS; p++) inputs[p] = u->map + spots[smaller(p, count - 1)].input;
    count_different(unit->weight + block * kernel * run * LANES, inputs, kernel, run, map_row,
                    counts);
    const float *vectors = unit->vectors.numbers + first;
    vec scale = load(vectors), constant = load(vectors + lanes), slope = load(vectors + 2 * lanes);
    vec shift_out = load(vectors + 3 * lanes), next_shift = load(vectors + 4 * lanes);
    for (int64_t p = 0; p < count; p++) {
        const Spot *spot = &spots[p];
        const float *from = u->stream + spot->shortcut;
        float *out = u->out + (pixel + p) * lanes + first;
        ivec sum = load_whole(unit->whole + spot->kind * lanes + first) - 2 * counts[p];
        vec t = __builtin_convertvector(sum, vec) * scale + constant;
        if (shortcut == IDENTITY)
            t += load(from + first);
        else if (shortcut == REPEAT)
            t += repeated(from, unit->channels, first);
        else if (shortcut == POOL)
            t += mean_of_four(from + first, u->pitch, u->width * u->pitch);
        else /* PROJECT has left it there */
            t += load(out);
        vec z = prelu(t, slope) + shift_out;
        store(out, z);
        if (u->next) {
            uint16_t bits = not_negative(z + next_shift);
            memcpy((char *)(u->next + spot->next) + 2 * block, &bits, 2);
        }
    }
}

static void tiles(const Placed *u, const Spot *spots, int64_t from, int64_t to, int64_t block) {
    int64_t shortcut = u->unit->shortcut;
    for (int64_t pixel = from; pixel < to; pixel += PIXELS, spots += PIXELS) {
        int64_t count = smaller(PIXELS, to - pixel);
        switch (shortcut) { /* constants: each loop is compiled for one of them */
        case IDENTITY: tile(u, IDENTITY, spots, pixel, count, block); break;
        case REPEAT: tile(u, REPEAT, spots, pixel, count, block); break;
        case POOL: tile(u, POOL, spots, pixel, count, block); break;
        default: tile(u, PROJECT, spots, pixel, count, block);
        }
    }
}

/* The 2 x 2 means times a real 1 x 1 convolution, into the output. scratch: PIXELS pixels. */
static void project(const Placed *u, const Spot *spots, int64_t from, int64_t to,
                    int64_t first_block, int64_t last_block, float *scratch) {
    int64_t channels = u->unit->channels, blocks = u->out_pitch / LANES, row = u->width * u->pitch;
    const float *weight = u->unit->projection.numbers;
    for (int64_t pixel = from; pixel < to; pixel += REAL_PIXELS, spots += REAL_PIXELS) {
        int64_t count = smaller(REAL_PIXELS, to - pixel);
        const float *inputs[REAL_PIXELS];
        for (int64_t p = 0; p < REAL_PIXELS; p++) {
            float *mean = scratch + smaller(p, count - 1) * channels;
            inputs[p] = mean;
            if (p >= count) continue;
            const float *corner = u->stream + spots[p].shortcut;
            for (int64_t c = 0; c < channels; c++) {
                float sum = corner[c] + corner[c + u->pitch];
                sum += corner[c + row];
                mean[c] = (sum + corner[c + row + u->pitch]) * 0.25f;
            }
        }
        for (int64_t block = first_block; block < last_block; block++) {
            vec sums[REAL_PIXELS];
            real_product(weight + block * channels * LANES, inputs, 1, channels, 0, sums);
            vec offset = load(weight + (blocks * channels + block) * LANES);
            for (int64_t p = 0; p < count; p++)
                store(u->out + (pixel + p) * u->out_pitch + block * LANES, sums[p] + offset);
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

/* Units that a thread can run on its pixels alone: the first, and those of 1 x 1 behind it. */
static int64_t run_of_units(const Network *net, int64_t first) {
    int64_t last = first + 1;
    while (last < net->unit_count && net->units[last].kernel_size == 1 &&
           net->units[last].stride == 1)
        last++;
    return last;
}

static void units(const Network *net, const Layout *layout, int64_t images, Member member) {
    float *scratch = layout->scratch + member.index * layout->scratch_floats;
    for (int64_t i = 0; i < net->unit_count;) {
        int64_t last = run_of_units(net, i), pixels = images * layout->units[i].pixels;
        int64_t groups = (pixels + PIXELS - 1) / PIXELS;
        if (member.count > 1 && groups < FEW_TILES * member.count) {
            const Placed *u = &layout->units[i];
            int64_t blocks = u->out_pitch / LANES;
            for (int64_t at = 0; at < pixels; at += CHUNK)
                chunk(u, at, smaller(at + CHUNK, pixels), share(member, blocks, 0),
                      share(member, blocks, 1), scratch);
            i++;
        } else {
            int64_t from = share(member, groups, 0) * PIXELS;
            int64_t to = smaller(share(member, groups, 1) * PIXELS, pixels);
            for (int64_t at = from; at < to; at += CHUNK)
                for (int64_t j = i; j < last; j++) {
                    const Placed *u = &layout->units[j];
                    chunk(u, at, smaller(at + CHUNK, to), 0, u->out_pitch / LANES, scratch);
                }
            i = last;
        }
        meet(member);
    }
}

/* Images from `first` on. Returns whether all numbers that this member saw were finite. */
static int run_group(const Network *net, const Call *call, const Layout *layout, int64_t first,
                     int64_t images, Member member) {
    int64_t rows = images * (call->height + 2 * layout->pad);
    int finite = prepare_rows(net, call, layout, first, share(member, rows, 0),
                              share(member, rows, 1));
    int64_t bytes = layout->map_bytes, start = share(member, bytes, 0);
    memset(layout->maps + start, 0, share(member, bytes, 1) - start);
    meet(member);
    rows = images * layout->stem_height;
    stem_rows(net, call, layout, share(member, rows, 0), share(member, rows, 1));
    meet(member);
    if (net->stem_pools) {
        rows = images * layout->first_height;
        pool_rows(net, layout, share(member, rows, 0), share(member, rows, 1));
        meet(member);
    }
    units(net, layout, images, member);
    int64_t means = images * layout->last_pitch / LANES;
    average(net, layout, share(member, means, 0), share(member, means, 1));
    meet(member);
    int64_t heads = (net->classes + HEAD_LANES - 1) / HEAD_LANES;
    classify(net, layout, call->logits + first * net->classes, images, share(member, heads, 0),
             share(member, heads, 1));
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

EXPORT int64_t tritonbnn_engine_workspace(const Network *net, const Call *call) {
    Plan plan;
    Layout layout;
    if (tritonbnn_check_network(net) != DONE) return -BAD_NETWORK;
    int64_t code = make_plan(net, call, &plan);
    if (code == DONE)
        code = tritonbnn_lay_out(net, call->height, call->width, plan.images,
                                 plan.apart ? 1 : call->threads, NULL, &layout);
    if (code != DONE) return -code;
    return layout.bytes * (plan.apart ? call->threads : 1);
}

typedef struct {
    const Network *net;
    const Call *call;
    Plan plan;
    int64_t bytes; /* of a thread's own workspace */
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
                          call->workspace + member.index * work->bytes, &own);
        layout = &own;
        member = (Member){0, 1, NULL};
    }
    int finite = 1;
    for (; first < last; first += step)
        finite &= run_group(net, call, layout, first, smaller(step, last - first), member);
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
    work.bytes = bytes / (work.plan.apart ? call->threads : 1);
    if (!work.plan.apart)
        tritonbnn_lay_out(net, call->height, call->width, work.plan.images, call->threads,
                          call->workspace, &work.shared);
    if (call->threads > 1 && call->team.parallel)
        call->team.parallel(run_in_team, &work, (unsigned)call->threads, 0);
    else
        run_member(&work, (Member){0, 1, NULL});
    return work.finite ? DONE : NOT_FINITE;
}

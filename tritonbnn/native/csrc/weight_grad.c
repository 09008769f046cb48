/* The gradient of a binary convolution to its weight, by table.

   dw[o, c, tap] = sum over output pixels of grad[pixel, o] * sign[pixel + tap, c]. Lanes are 16
   output channels, which lie side by side in memory. Thirty pixels make a word of signs, and their
   gradients make the tables, which serve all taps and input channels.

   A padded sign is neither +1 nor -1. Its bit is 0, which counts as -1, so the gradients of those
   pixels whose tap falls on padding are added once more. Where those are nearly all that a channel
   has, or not finite, the pixels are left out instead, tap by tap: their difference would be
   rounding, or infinity minus infinity. */
#include "vector.h"

#include "bits.h"
#include "geometry.h"
#include "table.h"
#include "transpose.h"
#include "workspace.h"

#define BLOCK 64 /* channels that are transposed at a time, so that they stay in the first cache */
#define MOST 0.9f /* of a channel's gradients, at which padding is left out instead */
#define SPAN 128 /* words whose sums have an accumulator of their own: long sums lose digits */

typedef struct {
    const geometry *g;
    const void *grad;
    int64_t grad_type;
    const uint32_t *index; /* [word][tap][channel] */
    int64_t pixels, taps;
} problem;

typedef struct {
    int64_t image, y, x;
} pixel;

INLINE pixel pixel_at(const geometry *g, int64_t i) {
    int64_t row = i / g->out_width;
    return (pixel){row / g->out_height, row % g->out_height, i % g->out_width};
}

INLINE void next_pixel(const geometry *g, pixel *p) {
    if (++p->x < g->out_width) return;
    p->x = 0;
    if (++p->y < g->out_height) return;
    p->y = 0;
    p->image++;
}

/* Whether a tap falls inside the image at this output pixel. */
INLINE int is_inside(const geometry *g, pixel p, int64_t tap) {
    int64_t y = p.y * g->stride + tap / g->kernel_size - g->padding;
    int64_t x = p.x * g->stride + tap % g->kernel_size - g->padding;
    return y >= 0 && y < g->height && x >= 0 && x < g->width;
}

/* Where each pixel of a word has its first tap in the map. */
static void find_pixels(const problem *p, sign_map map, int64_t word, int64_t at[WORD]) {
    const geometry *g = p->g;
    pixel walk = pixel_at(g, word * WORD);
    for (int64_t i = 0; i < word_size(p->pixels, word); i++, next_pixel(g, &walk))
        at[i] = walk.image * map.image + walk.y * g->stride * map.row +
                walk.x * g->stride * map.pixel;
}

/* Sixteen jobs, one a lane: a job is the 30 pixels of a word, one tap, and 32 channels. */
static void index_jobs(const problem *p, sign_map map, uint32_t *index, int64_t first,
                       int64_t count) {
    const geometry *g = p->g;
    int64_t words = words_of(g->channels), of_word = p->taps * words, found = -1, at[WORD];
    uvec rows[32] = {{0}};
    for (int64_t lane = 0; lane < count; lane++) {
        int64_t job = first + lane, word = job / of_word, tap = job % of_word / words;
        if (word != found) find_pixels(p, map, word, at);
        found = word;
        const uint32_t *from = map.words + tap / g->kernel_size * map.row +
                               tap % g->kernel_size * map.pixel + job % words;
        for (int64_t i = 0; i < word_size(p->pixels, word); i++) rows[i][lane] = from[at[i]];
    }
    transpose_bits(rows);
    for (int64_t lane = 0; lane < count; lane++) {
        int64_t job = first + lane, channel = job % words * SIGNS_OF_WORD;
        uint32_t *to = index + job / words * g->channels + channel;
        int64_t size = smaller(SIGNS_OF_WORD, g->channels - channel);
        for (int64_t c = 0; c < size; c++) to[c] = rows[c][lane];
    }
}

/* The signs by pixels: bit i of index[word][tap][channel] is that of pixel 30 word + i. */
static uint32_t *make_index(const problem *p, const uint32_t *signs, int threads) {
    int64_t words = table_words(p->pixels), channels = p->g->channels;
    int64_t jobs = words * p->taps * words_of(channels);
    uint32_t *index =
        tritonbnn_workspace(WORKSPACE_SHARED, words * p->taps * channels * sizeof *index);
    sign_map map = tritonbnn_padded_signs(signs, p->g, threads);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < jobs; first += LANES)
        index_jobs(p, map, index, first, smaller(LANES, jobs - first));
    return index;
}

/* The gradients of a word's pixels; 0 where an only tap falls on padding (-1: any tap). */
static void load_pixels(const problem *p, int64_t word, int64_t out, int64_t only_tap,
                        vec numbers[WORD]) {
    const geometry *g = p->g;
    int64_t size = word_size(p->pixels, word), lanes = smaller(LANES, g->out_channels - out);
    int64_t from = word * WORD * g->out_channels + out;
    if (p->grad_type == FLOAT32 && lanes == LANES) {
        const float *floats = (const float *)p->grad + from;
        for (int64_t i = 0; i < size; i++, floats += g->out_channels)
            EACH(r, PARTS) ((part *)(numbers + i))[r] = load_part(floats + r * (LANES / PARTS));
    } else {
        for (int64_t i = 0; i < size; i++, from += g->out_channels)
            numbers[i] = load_some(p->grad, p->grad_type, from, lanes);
    }
    if (only_tap < 0) return;
    pixel at = pixel_at(g, word * WORD);
    for (int64_t i = 0; i < size; i++, next_pixel(g, &at))
        if (!is_inside(g, at, only_tap)) numbers[i] = splat(0);
}

/* Without the signs. */
INLINE vec absolute(vec v) { return (vec)((ivec)v & 0x7fffffff); }

/* Add the absolute values of some numbers. */
INLINE void add_absolute(const vec *numbers, int64_t count, vec *sum) {
    EACH(r, PARTS) {
        part total = ((part *)sum)[r];
        for (int64_t i = 0; i < count; i++)
            total += (part)((part_bits)((const part *)(numbers + i))[r] & 0x7fffffff);
        ((part *)sum)[r] = total;
    }
}

/* Add sums[tap][channel] of the given taps; return the sum of the gradients' absolute values. With
   mask, the gradients are left out whose one tap falls on padding. */
static vec sum_taps(const problem *p, int64_t out, int64_t first_tap, int64_t last_tap, int mask,
                    vec *sums, vec *span_sums) {
    int64_t channels = p->g->channels, count = (last_tap - first_tap) * channels;
    int64_t words = table_words(p->pixels);
    tables t;
    vec numbers[WORD], absolute_sum = splat(0);
    for (int64_t start = 0; start < words; start += SPAN) {
        vec *into = words > SPAN ? span_sums : sums;
        if (into == span_sums) memset(span_sums, 0, count * sizeof(vec));
        for (int64_t word = start; word < smaller(start + SPAN, words); word++) {
            int64_t size = word_size(p->pixels, word);
            load_pixels(p, word, out, mask ? first_tap : -1, numbers);
            add_absolute(numbers, size, &absolute_sum);
            make_tables(&t, numbers, size);
            const uint32_t *signs = p->index + (word * p->taps + first_tap) * channels;
            add_products(&t, groups_of(size), signs, 1, into, count);
        }
        if (into == sums) continue;
        for (int64_t i = 0; i < count; i++) add_vec(sums + i, span_sums + i);
    }
    return absolute_sum;
}

/* The sum of the gradients whose tap falls on padding, and of their absolute values. */
static vec padded_sum(const problem *p, int64_t out, int64_t tap, vec *size) {
    const geometry *g = p->g;
    int64_t ty = tap / g->kernel_size, tx = tap % g->kernel_size;
    int64_t lanes = smaller(LANES, g->out_channels - out), per_image = g->out_height * g->out_width;
    vec total = splat(0);
    *size = splat(0);
    for (int64_t y = 0; y < g->out_height; y++) {
        int64_t row = y * g->stride + ty - g->padding;
        int all = row < 0 || row >= g->height;
        for (int64_t x = 0; x < g->out_width; x++) {
            int64_t column = x * g->stride + tx - g->padding;
            if (!all && column >= 0 && column < g->width) continue;
            vec images = splat(0);
            for (int64_t n = 0; n < g->images; n++) {
                int64_t at = (n * per_image + y * g->out_width + x) * g->out_channels + out;
                vec numbers = load_some(p->grad, p->grad_type, at, lanes);
                images += numbers;
                *size += absolute(numbers);
            }
            total += images;
        }
    }
    return total;
}

/* Whether the gradients on padding can be added and taken off again, in all lanes. */
INLINE int can_cancel(vec padded, vec padded_size, vec size) {
    vec zero = padded - padded, most = MOST * size;
    for (int lane = 0; lane < LANES; lane++)
        if (zero[lane] != 0 || !(padded_size[lane] <= most[lane])) return 0;
    return 1;
}

typedef struct {
    float *values;
    const float *clip_by; /* the weight, beyond +-1 of which its gradient is 0; or NULL */
    weight_strides strides;
} destination;

/* The gradient of a weight: 0 where the weight is beyond +-1, or no number. */
INLINE float clipped(const destination *d, int64_t at, float grad) {
    float w = d->clip_by ? d->clip_by[at] : 0;
    return w <= 1 && w >= -1 ? grad : 0;
}

/* Four output channels by four channels that lie side by side. */
INLINE void write_quads(const destination *d, int64_t at, const vec *sums, int64_t lane) {
    const float *from[4];
    float rows[4][4], *to[4];
    for (int i = 0; i < 4; i++) {
        from[i] = (const float *)(sums + i) + lane;
        to[i] = rows[i];
    }
    transpose_quads(from, to);
    for (int i = 0; i < 4; i++, at += d->strides.out_channel)
        for (int c = 0; c < 4; c++) d->values[at + c] = clipped(d, at + c, rows[i][c]);
}

/* Write the sums of a tap, [channel] by lanes, of 16 output channels, in the weight's layout. */
static void write_tap(const geometry *g, const destination *d, int64_t at, int64_t lanes,
                      const vec *sums) {
    weight_strides s = d->strides;
    int64_t quads = s.channel == 1 && lanes == LANES ? g->channels / 4 * 4 : 0;
    for (int64_t lane = 0; lane < lanes; lane += 4)
        for (int64_t c = 0; c < quads; c += 4)
            write_quads(d, at + lane * s.out_channel + c, sums + c, lane);
    for (int64_t first = quads; first < g->channels; first += BLOCK)
        for (int64_t lane = 0; lane < lanes; lane++)
            for (int64_t c = first; c < smaller(first + BLOCK, g->channels); c++) {
                int64_t i = at + lane * s.out_channel + c * s.channel;
                d->values[i] = clipped(d, i, sums[c][lane]);
            }
}

/* The gradients of some taps of 16 output channels. Whether padding is left out is decided tap by
   tap, so that it does not depend on which taps are computed together. */
static void block_grad(const problem *p, const destination *d, int64_t out, int64_t first_tap,
                       int64_t last_tap) {
    int64_t taps = last_tap - first_tap, channels = p->g->channels, count = taps * channels;
    vec *sums = tritonbnn_workspace(WORKSPACE_OWN, 2 * (count + taps) * sizeof(vec));
    vec *span_sums = sums + count, *padded = span_sums + count, *padded_sizes = padded + taps;
    for (int64_t i = 0; i < taps; i++) {
        padded[i] = padded_sum(p, out, first_tap + i, padded_sizes + i);
        for (int64_t c = 0; c < channels; c++) sums[i * channels + c] = padded[i];
    }
    vec size = sum_taps(p, out, first_tap, last_tap, 0, sums, span_sums);
    for (int64_t i = 0; i < taps; i++) {
        int64_t tap = first_tap + i, k = p->g->kernel_size;
        vec *of_tap = sums + i * channels;
        if (p->g->padding && !can_cancel(padded[i], padded_sizes[i], size)) {
            memset(of_tap, 0, channels * sizeof(vec));
            sum_taps(p, out, tap, tap + 1, 1, of_tap, span_sums);
        }
        int64_t at = out * d->strides.out_channel + tap / k * d->strides.row +
                     tap % k * d->strides.column;
        write_tap(p->g, d, at, smaller(LANES, p->g->out_channels - out), of_tap);
    }
}

/* grad: (images, out_height, out_width, out_channels), float or bfloat16. signs: the packed input.
   result, and clip_by if not NULL: (out_channels, channels, k, k) in the given strides. */
EXPORT void tritonbnn_weight_grad(const void *grad, int64_t grad_type, const uint32_t *signs,
                                  float *result, const float *clip_by, const geometry *g,
                                  const weight_strides *strides, int64_t threads) {
    problem p = {g, grad, grad_type, 0, g->images * g->out_height * g->out_width,
                 g->kernel_size * g->kernel_size};
    destination d = {result, clip_by, *strides};
    p.index = make_index(&p, signs, threads);
    int64_t blocks = ceil_div(g->out_channels, LANES);
    /* Taps are parted only where there are few blocks for the threads: each part makes its own
       tables. No sum is parted, so its bits are the same. */
    int64_t parts = smaller(p.taps, ceil_div(threads, larger(blocks, 1)));
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t job = 0; job < blocks * parts; job++) {
        int64_t part = job % parts;
        block_grad(&p, &d, job / parts * LANES, part * p.taps / parts, (part + 1) * p.taps / parts);
    }
}

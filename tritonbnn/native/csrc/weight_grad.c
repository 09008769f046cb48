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
    int64_t words = packed_words(g->channels), of_word = p->taps * words, found = -1, at[WORD];
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
        int64_t size = min64(SIGNS_OF_WORD, g->channels - channel);
        for (int64_t c = 0; c < size; c++) to[c] = rows[c][lane];
    }
}

/* The signs by pixels: bit i of index[word][tap][channel] is that of pixel 30 word + i. */
static uint32_t *make_index(const problem *p, const uint32_t *signs, int threads) {
    int64_t words = table_words(p->pixels), channels = p->g->channels;
    int64_t jobs = words * p->taps * packed_words(channels);
    uint32_t *index =
        tritonbnn_workspace(WORKSPACE_SHARED, words * p->taps * channels * sizeof *index);
    sign_map map = tritonbnn_padded_signs(signs, p->g, threads);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < jobs; first += LANES)
        index_jobs(p, map, index, first, min64(LANES, jobs - first));
    return index;
}

/* The gradients of a word's pixels; 0 where an only tap falls on padding (-1: any tap). */
static void load_pixels(const problem *p, int64_t word, int64_t out, int64_t only_tap,
                        vec numbers[WORD]) {
    const geometry *g = p->g;
    int64_t size = word_size(p->pixels, word), lanes = min64(LANES, g->out_channels - out);
    int64_t from = word * WORD * g->out_channels + out;
    for (int64_t i = 0; i < size; i++, from += g->out_channels)
        numbers[i] = load_some(p->grad, p->grad_type, from, lanes);
    if (only_tap < 0) return;
    pixel at = pixel_at(g, word * WORD);
    for (int64_t i = 0; i < size; i++, next_pixel(g, &at))
        if (!is_inside(g, at, only_tap)) numbers[i] = splat(0);
}

/* sums[tap][channel] of the given taps. With mask, each tap has tables of its own. */
static void sum_taps(const problem *p, int64_t out, int64_t first_tap, int64_t last_tap, int mask,
                     vec *sums, vec *span_sums) {
    int64_t channels = p->g->channels, count = (last_tap - first_tap) * channels;
    int64_t words = table_words(p->pixels);
    tables t;
    vec numbers[WORD];
    for (int64_t start = 0; start < words; start += SPAN) {
        vec *into = words > SPAN ? span_sums : sums;
        if (into == span_sums) memset(span_sums, 0, count * sizeof(vec));
        for (int64_t word = start; word < min64(start + SPAN, words); word++) {
            int64_t size = word_size(p->pixels, word);
            load_pixels(p, word, out, mask ? first_tap : -1, numbers);
            make_tables(&t, numbers, size);
            const uint32_t *signs = p->index + (word * p->taps + first_tap) * channels;
            add_products(&t, groups_of(size), signs, 1, into, count);
        }
        if (into == sums) continue;
        for (int64_t i = 0; i < count; i++) sums[i] += span_sums[i];
    }
}

/* Without the signs. */
INLINE vec absolute(vec v) { return (vec)((ivec)v & 0x7fffffff); }

/* The sum of the gradients whose tap falls on padding, and of their absolute values. */
static vec padded_sum(const problem *p, int64_t out, int64_t tap, vec *size) {
    const geometry *g = p->g;
    int64_t ty = tap / g->kernel_size, tx = tap % g->kernel_size;
    int64_t lanes = min64(LANES, g->out_channels - out), per_image = g->out_height * g->out_width;
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

/* The sum of the absolute values of all gradients. */
static vec size_of_all(const problem *p, int64_t out) {
    int64_t lanes = min64(LANES, p->g->out_channels - out);
    vec total = splat(0);
    for (int64_t i = 0; i < p->pixels; i++)
        total += absolute(load_some(p->grad, p->grad_type, i * p->g->out_channels + out, lanes));
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
    const float *clip_by; /* the weight: its gradient is 0 where the weight is beyond +-1; or NULL */
    weight_strides strides;
} destination;

/* Write the taps of 16 output channels, in the weight's own layout. */
static void write_taps(const geometry *g, const destination *d, int64_t out, int64_t first_tap,
                       int64_t last_tap, const vec *sums) {
    weight_strides s = d->strides;
    int64_t lanes = min64(LANES, g->out_channels - out);
    for (int64_t tap = first_tap; tap < last_tap; tap++, sums += g->channels) {
        int64_t at = out * s.out_channel + tap / g->kernel_size * s.row +
                     tap % g->kernel_size * s.column;
        for (int64_t first = 0; first < g->channels; first += BLOCK)
            for (int64_t lane = 0; lane < lanes; lane++)
                for (int64_t c = first; c < min64(first + BLOCK, g->channels); c++) {
                    int64_t i = at + lane * s.out_channel + c * s.channel;
                    float w = d->clip_by ? d->clip_by[i] : 0;
                    d->values[i] = w <= 1 && w >= -1 ? sums[c][lane] : 0; /* 0 for a NaN too */
                }
    }
}

static void block_grad(const problem *p, const destination *d, int64_t out, int64_t first_tap,
                       int64_t last_tap) {
    int64_t channels = p->g->channels, count = (last_tap - first_tap) * channels;
    vec *sums = tritonbnn_workspace(WORKSPACE_OWN, 2 * count * sizeof(vec));
    vec size = p->g->padding ? size_of_all(p, out) : splat(0);
    int left_out[9]; /* of each tap: a kernel has 3 x 3 at most */
    for (int64_t tap = first_tap; tap < last_tap; tap++) {
        vec padded_size, padded = padded_sum(p, out, tap, &padded_size);
        left_out[tap] = !can_cancel(padded, padded_size, size);
        for (int64_t c = 0; c < channels; c++) sums[(tap - first_tap) * channels + c] = padded;
    }
    sum_taps(p, out, first_tap, last_tap, 0, sums, sums + count);
    for (int64_t tap = first_tap; tap < last_tap; tap++) {
        if (!left_out[tap]) continue;
        vec *of_tap = sums + (tap - first_tap) * channels;
        memset(of_tap, 0, channels * sizeof(vec));
        sum_taps(p, out, tap, tap + 1, 1, of_tap, sums + count);
    }
    write_taps(p->g, d, out, first_tap, last_tap, sums);
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
    int64_t parts = min64(p.taps, ceil_div(threads, max64(blocks, 1)));
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t job = 0; job < blocks * parts; job++) {
        int64_t part = job % parts;
        block_grad(&p, &d, job / parts * LANES, part * p.taps / parts, (part + 1) * p.taps / parts);
    }
}

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
#include "destination.h"
#include "geometry.h"
#include "table.h"
#include "workspace.h"

#define MOST 0.9f /* of a channel's gradients, at which padding is left out instead */
#define SPAN 128 /* words whose sums have an accumulator of their own: long sums lose digits */
#define SECTIONS 16 /* of all words at most, whose sums are joined last */
#define FEW_CHANNELS 64 /* whose tables take as long to make as to use */

typedef struct {
    const geometry *g;
    const void *grad;
    int64_t grad_type;
    const uint32_t *index; /* [word][tap][channel] */
    int64_t pixels, taps;
    int64_t words, section; /* of all pixels, and of a section: whole spans */
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

/* Some taps of 16 output channels. */
typedef struct {
    int64_t out, first, last;
} job;

/* sums[tap][channel] of one section; the sum of its gradients' absolute values. With mask, those
   gradients are left out whose one tap falls on padding. span_sums: as many. */
static vec sum_section(const problem *p, job j, int64_t section, int mask, vec *sums,
                       vec *span_sums) {
    int64_t channels = p->g->channels, count = (j.last - j.first) * channels;
    int64_t first = section * p->section, last = smaller(first + p->section, p->words);
    tables t;
    vec numbers[WORD], absolute_sum = splat(0);
    memset(sums, 0, count * sizeof(vec));
    for (int64_t start = first; start < last; start += SPAN) {
        vec *into = last - first > SPAN ? span_sums : sums;
        if (into == span_sums) memset(span_sums, 0, count * sizeof(vec));
        for (int64_t word = start; word < smaller(start + SPAN, last); word++) {
            int64_t size = word_size(p->pixels, word);
            load_pixels(p, word, j.out, mask ? j.first : -1, numbers);
            add_absolute(numbers, size, &absolute_sum);
            make_tables(&t, numbers, size);
            const uint32_t *signs = p->index + (word * p->taps + j.first) * channels;
            add_products(&t, groups_of(size), signs, 1, into, count);
        }
        if (into == sums) continue;
        for (int64_t i = 0; i < count; i++) add_vec(sums + i, span_sums + i);
    }
    return absolute_sum;
}

/* The same of all sections, joined in order. scratch: twice as many. */
static vec sum_taps(const problem *p, job j, int mask, vec *sums, vec *scratch) {
    int64_t count = (j.last - j.first) * p->g->channels;
    vec size = sum_section(p, j, 0, mask, sums, scratch), *section_sums = scratch + count;
    for (int64_t section = 1; section * p->section < p->words; section++) {
        size += sum_section(p, j, section, mask, section_sums, scratch);
        for (int64_t i = 0; i < count; i++) add_vec(sums + i, section_sums + i);
    }
    return size;
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

/* From sums to gradients: add what padding has taken, clip and write. size: of all gradients.
   Whether padding is left out is decided tap by tap, so that it does not depend on which taps are
   computed together. scratch: as many vectors as 2 taps have channels. */
static void finish(const problem *p, const destination *d, job j, vec size, vec *sums,
                   vec *scratch) {
    int64_t channels = p->g->channels;
    for (int64_t tap = j.first; tap < j.last && p->g->padding; tap++) {
        vec *of_tap = sums + (tap - j.first) * channels, padded_size;
        vec padded = padded_sum(p, j.out, tap, &padded_size);
        if (can_cancel(padded, padded_size, size))
            for (int64_t c = 0; c < channels; c++) add_vec(of_tap + c, &padded);
        else
            sum_taps(p, (job){j.out, tap, tap + 1}, 1, of_tap, scratch);
    }
    if (j.last - j.first == p->taps && kernels_follow(p->g, d)) {
        write_kernels(p->g, d, j.out, sums);
        return;
    }
    for (int64_t tap = j.first; tap < j.last; tap++)
        write_tap(p->g, d, j.out, tap, sums + (tap - j.first) * channels);
}

/* Threads share taps only where there are fewer blocks than threads: each makes its own tables. */
static void share_taps(const problem *p, const destination *d, int64_t blocks, int64_t threads) {
    int64_t parts = smaller(p->taps, ceil_div(threads, larger(blocks, 1)));
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < blocks * parts; i++) {
        int64_t part = i % parts;
        job j = {i / parts * LANES, part * p->taps / parts, (part + 1) * p->taps / parts};
        int64_t count = (j.last - j.first) * p->g->channels;
        vec *sums = tritonbnn_workspace(WORKSPACE_OWN, 3 * count * sizeof(vec));
        vec size = sum_taps(p, j, 0, sums, sums + count);
        finish(p, d, j, size, sums, sums + count);
    }
}

/* Threads share the sections where tables would take most of the time. */
static void share_sections(const problem *p, const destination *d, int64_t blocks,
                           int64_t threads) {
    int64_t channels = p->g->channels, count = p->taps * channels;
    int64_t sections = ceil_div(p->words, p->section);
    /* of each block and section: its sums, and the size of its gradients */
    vec *all = tritonbnn_workspace(WORKSPACE_PARTS,
                                   blocks * sections * (count + 1) * sizeof(vec));
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < blocks * sections; i++) {
        vec *sums = all + i * (count + 1);
        vec *scratch = tritonbnn_workspace(WORKSPACE_OWN, count * sizeof(vec));
        job j = {i / sections * LANES, 0, p->taps};
        sums[count] = sum_section(p, j, i % sections, 0, sums, scratch);
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < blocks * p->taps; i++) {
        int64_t block = i / p->taps, tap = i % p->taps;
        vec *sums = tritonbnn_workspace(WORKSPACE_OWN, 3 * channels * sizeof(vec));
        vec *first = all + block * sections * (count + 1), size = first[count];
        memcpy(sums, first + tap * channels, channels * sizeof(vec));
        for (int64_t section = 1; section < sections; section++) {
            const vec *more = first + section * (count + 1);
            size += more[count];
            for (int64_t c = 0; c < channels; c++) add_vec(sums + c, more + tap * channels + c);
        }
        finish(p, d, (job){block * LANES, tap, tap + 1}, size, sums, sums + channels);
    }
}

/* grad: (images, out_height, out_width, out_channels), float or bfloat16. signs: the packed input.
   result, and clip_by if not NULL: (out_channels, channels, k, k) in the given strides. */
EXPORT void tritonbnn_weight_grad(const void *grad, int64_t grad_type, const uint32_t *signs,
                                  float *result, const float *clip_by, const geometry *g,
                                  const weight_strides *strides, int64_t threads) {
    problem p = {.g = g, .grad = grad, .grad_type = grad_type};
    p.pixels = g->images * g->out_height * g->out_width;
    p.taps = g->kernel_size * g->kernel_size;
    p.words = table_words(p.pixels);
    p.section = larger(1, ceil_div(ceil_div(p.words, SPAN), SECTIONS)) * SPAN;
    p.index = make_index(&p, signs, threads);
    destination d = {result, clip_by, *strides};
    int64_t blocks = ceil_div(g->out_channels, LANES);
    /* Either way no sum is parted but at its sections, so its bits are the same. */
    if (blocks < threads && p.words > p.section && g->channels < FEW_CHANNELS)
        share_sections(&p, &d, blocks, threads);
    else
        share_taps(&p, &d, blocks, threads);
}

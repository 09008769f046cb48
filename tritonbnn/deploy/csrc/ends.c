/* A network's real ends: the image made ready, the stem, the means over pixels, and the head. */
#include "ends.h"

#include <float.h>

#include "real.h"

/* Copy an image between its zeros, channels innermost. Returns whether all numbers were finite. */
static int copy_row(const Network *net, const Call *call, int64_t image, int64_t y, float *to) {
    int64_t channels = net->in_channels, plane = call->height * call->width;
    int finite = 1;
    for (int64_t c = 0; c < channels; c++) {
        int64_t from = (image * channels + c) * plane + y * call->width;
        if (call->bytes_a_number == 1) {
            const uint8_t *bytes = (const uint8_t *)call->images + from;
            const float *table = call->table.numbers + c * 256;
            for (int64_t x = 0; x < call->width; x++) to[x * channels + c] = table[bytes[x]];
        } else {
            const float *numbers = (const float *)call->images + from;
            int good = 1;
            for (int64_t x = 0; x < call->width; x++) {
                float number = numbers[x];
                good &= number >= -FLT_MAX && number <= FLT_MAX;
                to[x * channels + c] = number;
            }
            finite &= good;
        }
    }
    return finite;
}

int prepare_rows(const Network *net, const Call *call, const Layout *layout, int64_t first_image,
                 int64_t from, int64_t to) {
    int64_t pad = layout->pad, height = call->height + 2 * pad;
    int64_t row = (call->width + 2 * pad) * net->in_channels;
    int finite = 1;
    for (int64_t r = from; r < to; r++) {
        int64_t y = r % height - pad;
        float *into = layout->padded + r * row;
        if (y < 0 || y >= call->height) {
            memset(into, 0, row * sizeof *into);
            continue;
        }
        memset(into, 0, pad * net->in_channels * sizeof *into);
        into += pad * net->in_channels;
        finite &= copy_row(net, call, first_image + r / height, y, into);
        memset(into + call->width * net->in_channels, 0, pad * net->in_channels * sizeof *into);
    }
    return finite;
}

/* Where LANES channels of a row of the first stream go, and the signs of them. */
typedef struct {
    float *numbers;
    char *bits;
    int64_t bytes; /* of a pixel's signs */
    vec threshold;
} FirstRow;

static FirstRow first_row(const Network *net, const Layout *layout, int64_t row, int64_t block) {
    const Stream *first = &layout->first;
    int64_t pad = net->units[0].kernel_size / 2, height = layout->first_height;
    int64_t line = row / height * (height + 2 * pad) + row % height + pad;
    int64_t pixel = line * (first->width + 2 * pad) + pad, words = words_of(net->stem_channels);
    int64_t lanes = blocks_of(net->stem_channels) * LANES;
    const float *thresholds = net->stem.numbers + net->stem.count - lanes;
    return (FirstRow){
        .numbers = first->numbers + block * first->plane + row % first->rows * first->width * LANES,
        .bits = (char *)(layout->map + pixel * words) + 2 * block,
        .bytes = 4 * words,
        .threshold = load(thresholds + block * LANES),
    };
}

INLINE void store_first(const FirstRow *row, int64_t x, vec z) {
    store(row->numbers + x * LANES, z);
    uint16_t bits = at_least(z, row->threshold);
    memcpy(row->bits + x * row->bytes, &bits, 2);
}

static void stem_row(const Network *net, const Call *call, const Layout *layout, int64_t row,
                     int64_t block) {
    int64_t kernel = net->stem_kernel_size, blocks = blocks_of(net->stem_channels);
    int64_t run = kernel * net->in_channels, padded = call->width + 2 * layout->pad;
    int64_t image = row / layout->stem_height, y = row % layout->stem_height;
    const float *weight = net->stem.numbers + block * kernel * run * LANES;
    vec offset = load(net->stem.numbers + (kernel * run * blocks + block) * LANES);
    const float *line = layout->padded + (image * (call->height + 2 * layout->pad) +
                                          y * net->stem_stride) * padded * net->in_channels;
    float *raw = NULL;
    FirstRow first = {0};
    if (net->stem_pools)
        raw = layout->raw + (row * layout->stem_width * blocks + block) * LANES;
    else
        first = first_row(net, layout, row, block);
    for (int64_t x = 0; x < layout->stem_width; x += REAL_PIXELS) {
        int64_t count = smaller(REAL_PIXELS, layout->stem_width - x);
        const float *inputs[REAL_PIXELS];
        vec sums[REAL_PIXELS];
        for (int64_t p = 0; p < REAL_PIXELS; p++)
            inputs[p] = line + (x + smaller(p, count - 1)) * net->stem_stride * net->in_channels;
        real_product(weight, inputs, kernel, run, padded * net->in_channels, sums);
        for (int64_t p = 0; p < count; p++) {
            vec z = sums[p] + offset;
            if (net->stem_pools)
                store(raw + (x + p) * blocks * LANES, z);
            else
                store_first(&first, x + p, z);
        }
    }
}

void stem_rows(const Network *net, const Call *call, const Layout *layout, int64_t from,
               int64_t to) {
    for (int64_t row = from; row < to; row++)
        for (int64_t block = 0; block < blocks_of(net->stem_channels); block++)
            stem_row(net, call, layout, row, block);
}

void pool_rows(const Network *net, const Layout *layout, int64_t from, int64_t to) {
    int64_t blocks = blocks_of(net->stem_channels), width = layout->stem_width;
    for (int64_t row = from; row < to; row++) {
        int64_t image = row / layout->first_height, y = row % layout->first_height;
        int64_t top = larger(0, 2 * y - 1), bottom = smaller(layout->stem_height, 2 * y + 2);
        const float *raw = layout->raw + image * layout->stem_height * width * blocks * LANES;
        for (int64_t block = 0; block < blocks; block++) {
            FirstRow first = first_row(net, layout, row, block);
            for (int64_t x = 0; x < layout->first.width; x++) {
                int64_t left = larger(0, 2 * x - 1), right = smaller(width, 2 * x + 2);
                vec most = splat(-FLT_MAX);
                for (int64_t i = top; i < bottom; i++)
                    for (int64_t j = left; j < right; j++)
                        most = maximum(load(raw + ((i * width + j) * blocks + block) * LANES), most);
                store_first(&first, x, most);
            }
        }
    }
}

void average(const Network *net, const Layout *layout, float *features, int64_t from, int64_t to) {
    int64_t blocks = blocks_of(net->units[net->unit_count - 1].out_channels);
    for (int64_t i = from; i < to; i++) {
        int64_t image = i / blocks, block = i % blocks;
        const float *at = layout->last.numbers + block * layout->last.plane;
        at += image * layout->last_pixels * LANES;
        vec sum = splat(0);
        for (int64_t p = 0; p < layout->last_pixels; p++) sum += load(at + p * LANES);
        store(features + i * LANES, sum / (float)layout->last_pixels);
    }
}

enum { HEAD_VECTORS = HEAD_LANES / LANES, HEAD_IMAGES = 4 };

/* A block of classes of some images; the weights are read once for all of them. */
INLINE void classify_images(const float *weight, const float *const features[HEAD_IMAGES],
                            int64_t channels, int images, vec sums[HEAD_IMAGES][HEAD_VECTORS]) {
    vec total[HEAD_IMAGES][HEAD_VECTORS];
    for (int i = 0; i < images; i++)
        for (int v = 0; v < HEAD_VECTORS; v++) total[i][v] = splat(0);
    for (int64_t k = 0; k < channels; k++, weight += HEAD_LANES)
        for (int v = 0; v < HEAD_VECTORS; v++) {
            vec w = load(weight + v * LANES);
            for (int i = 0; i < images; i++) total[i][v] += w * features[i][k];
        }
    memcpy(sums, total, sizeof total);
}

void classify(const Network *net, const float *features, float *logits, int64_t images,
              int64_t from, int64_t to) {
    int64_t channels = net->units[net->unit_count - 1].out_channels;
    int64_t pitch = blocks_of(channels) * LANES;
    int64_t heads = (net->classes + HEAD_LANES - 1) / HEAD_LANES;
    for (int64_t head = from; head < to; head++) {
        const float *weight = net->head.numbers + head * channels * HEAD_LANES;
        const float *offset = net->head.numbers + (heads * channels + head) * HEAD_LANES;
        int64_t classes = smaller(HEAD_LANES, net->classes - head * HEAD_LANES);
        for (int64_t image = 0; image < images; image += HEAD_IMAGES) {
            int64_t count = smaller(HEAD_IMAGES, images - image);
            const float *inputs[HEAD_IMAGES];
            vec sums[HEAD_IMAGES][HEAD_VECTORS];
            for (int64_t i = 0; i < HEAD_IMAGES; i++)
                inputs[i] = features + (image + smaller(i, count - 1)) * pitch;
            if (count == 1)
                classify_images(weight, inputs, channels, 1, sums);
            else
                classify_images(weight, inputs, channels, HEAD_IMAGES, sums);
            for (int64_t i = 0; i < count; i++) {
                for (int v = 0; v < HEAD_VECTORS; v++) sums[i][v] += load(offset + v * LANES);
                memcpy(logits + (image + i) * net->classes + head * HEAD_LANES, sums[i],
                       classes * sizeof(float));
            }
        }
    }
}

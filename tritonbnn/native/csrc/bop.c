/* Bop and its second-order form: averages, comparison, flips and their count in one pass. */
#include "geometry.h"

#define EPSILON 1e-10f /* BOP_EPSILON of contract.py */
#define STRETCH 4096   /* weights of a thread at a time */

typedef struct {
    float threshold, gamma, keep, sigma, keep_squares, scale, squares_scale;
} Rule;

static Rule rule_of(double threshold, double gamma, double sigma, double scale,
                    double squares_scale) {
    return (Rule){(float)threshold,   (float)gamma, (float)(1 - gamma),  (float)sigma,
                  (float)(1 - sigma), (float)scale, (float)squares_scale};
}

/* Move the averages by one gradient; what a weight is compared with. squares may be NULL. */
INLINE float signal_of(float grad, float *average, float *squares, Rule rule) {
    *average = *average * rule.keep + grad * rule.gamma;
    if (!squares)
        return *average;
    *squares = *squares * rule.keep_squares + grad * grad * rule.sigma;
    float root = __builtin_sqrtf(*squares * rule.squares_scale) + EPSILON;
    return *average * rule.scale / root;
}

/* A comparison with a NaN is false, so that nothing flips there. */
INLINE int flips(float weight, float signal, Rule rule) {
    float agreement = weight * signal;
    return (agreement > rule.threshold) | ((agreement == rule.threshold) & (weight < 0));
}

INLINE int64_t stretch(float *weight, const float *grad, float *average, float *squares,
                       int64_t from, int64_t to, Rule rule) {
    int32_t changed = 0;
    #pragma omp simd reduction(+ : changed)
    for (int64_t i = from; i < to; i++) {
        float signal = signal_of(grad[i], average + i, squares ? squares + i : 0, rule);
        int flip = flips(weight[i], signal, rule);
        weight[i] = flip ? -weight[i] : weight[i];
        changed += flip;
    }
    return changed;
}

/* All (size,); squares may be NULL. changed: one number. */
EXPORT void tritonbnn_bop_update(float *weight, const float *grad, float *average, float *squares,
                                 int64_t size, double threshold, double gamma, double sigma,
                                 double scale, double squares_scale, int64_t *changed,
                                 int64_t threads) {
    Rule rule = rule_of(threshold, gamma, sigma, scale, squares_scale);
    int64_t total = 0;
    #pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : total)
    for (int64_t from = 0; from < size; from += STRETCH) {
        int64_t to = smaller(from + STRETCH, size);
        if (squares)
            total += stretch(weight, grad, average, squares, from, to, rule);
        else
            total += stretch(weight, grad, average, 0, from, to, rule);
    }
    *changed = total;
}

/* The flips of at most 32 weights as bits; bit i of word is weight i. */
INLINE uint32_t flips_of_word(uint32_t word, const float *grad, float *average, float *squares,
                              int64_t count, Rule rule) {
    int32_t flip[SIGNS_OF_WORD] = {0};
    #pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        float weight = word >> i & 1 ? 1.0f : -1.0f;
        flip[i] = flips(weight, signal_of(grad[i], average + i, squares ? squares + i : 0, rule), rule);
    }
    uint32_t bits = 0;
    #pragma omp simd reduction(| : bits)
    for (int i = 0; i < SIGNS_OF_WORD; i++) bits |= (uint32_t)flip[i] << i;
    return bits;
}

INLINE int64_t row_of_words(uint32_t *packed, const float *grad, float *average, float *squares,
                            int64_t channels, Rule rule) {
    int64_t changed = 0;
    for (int64_t c = 0; c < channels; c += SIGNS_OF_WORD, packed++) {
        float *second = squares ? squares + c : 0;
        uint32_t bits = channels - c >= SIGNS_OF_WORD
            ? flips_of_word(*packed, grad + c, average + c, second, SIGNS_OF_WORD, rule)
            : flips_of_word(*packed, grad + c, average + c, second, channels - c, rule);
        *packed ^= bits;
        changed += __builtin_popcount(bits);
    }
    return changed;
}

/* packed: (rows, words). The others: (rows, channels); squares may be NULL. changed: one number. */
EXPORT void tritonbnn_bop_update_packed(uint32_t *packed, const float *grad, float *average,
                                        float *squares, int64_t rows, int64_t channels,
                                        double threshold, double gamma, double sigma, double scale,
                                        double squares_scale, int64_t *changed, int64_t threads) {
    Rule rule = rule_of(threshold, gamma, sigma, scale, squares_scale);
    int64_t words = words_of(channels), total = 0;
    #pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : total)
    for (int64_t row = 0; row < rows; row++) {
        int64_t at = row * channels;
        if (squares)
            total += row_of_words(packed + row * words, grad + at, average + at, squares + at,
                                  channels, rule);
        else
            total += row_of_words(packed + row * words, grad + at, average + at, 0, channels, rule);
    }
    *changed = total;
}

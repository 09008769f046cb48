/* Packed signs, moved about: maps padded with zeros, and blocks of bits transposed. */
#ifndef TRITONBNN_BITS_H
#define TRITONBNN_BITS_H

#include "vector.h"

#include "geometry.h"

/* Transpose 16 blocks of 32 x 32 bits, one a lane: bit j of row i becomes bit i of row j. */
INLINE void transpose_bits(uvec rows[32]) {
    uint32_t mask = 0x0000ffff;
    for (int width = 16; width; width /= 2, mask ^= mask << width) {
        for (int i = 0; i < 32; i++) {
            if (i & width) continue;
            uvec swapped = (rows[i] >> width ^ rows[i + width]) & mask;
            rows[i + width] ^= swapped;
            rows[i] ^= swapped << width;
        }
    }
}

/* Where a padded map of packed signs has the word of an input pixel: padding is words of 0. */
typedef struct {
    const uint32_t *words;
    int64_t pixel, row, image; /* strides in words */
} sign_map;

/* The map of packed signs, (images, height, width, words), with its zeros around; where there is
   no padding, the signs themselves. Read it at (image, row + padding, column + padding). */
sign_map tritonbnn_padded_signs(const uint32_t *signs, const geometry *g, int threads);

#endif

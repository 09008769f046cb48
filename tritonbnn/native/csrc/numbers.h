/* Numbers in memory, of the types that tensors have, and how they are read and written. */
#ifndef TRITONBNN_NUMBERS_H
#define TRITONBNN_NUMBERS_H

#include "vector.h"

/* Python knows these numbers too. */
typedef enum { FLOAT32, BFLOAT16, INT16, INT32 } Type;

/* Numbers of one type in memory; data is NULL where there are none. */
typedef struct {
    void *data;
    Type type;
} Numbers;

#define SIGNS_OF_WORD 32

/* Words that hold the packed signs of so many channels. */
INLINE int64_t words_of(int64_t channels) {
    return (channels + SIGNS_OF_WORD - 1) / SIGNS_OF_WORD;
}

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

INLINE float from_bfloat16(bfloat16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

/* Rounded to nearest, ties to even; a NaN stays one. */
INLINE bfloat16 to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bfloat16)(x != x ? bits >> 16 | 0x40 : rounded);
}

/* One of some numbers. With a constant type no switch is left. */
INLINE float number(const void *data, Type type, int64_t i) {
    switch (type) {
    case BFLOAT16:
        return from_bfloat16(((const bfloat16 *)data)[i]);
    case INT16:
        return ((const int16_t *)data)[i];
    case INT32:
        return (float)((const int32_t *)data)[i];
    default:
        return ((const float *)data)[i];
    }
}

/* The same in float64, which holds every int32. */
INLINE double wide_number(const void *data, Type type, int64_t i) {
    return type == INT32 ? (double)((const int32_t *)data)[i] : number(data, type, i);
}

/* At most 16 numbers of an array as a vector; lanes past the count are 0. */
INLINE vec load_some(const void *numbers, int64_t type, int64_t index, int64_t count) {
    if (type == FLOAT32) return load_floats((const float *)numbers + index, count);
    if (count >= LANES) return load_bfloat16((const bfloat16 *)numbers + index);
    vec v = splat(0);
    for (int64_t lane = 0; lane < count; lane++) v[lane] = number(numbers, type, index + lane);
    return v;
}

INLINE void store_some(void *numbers, int64_t type, int64_t index, vec v, int64_t count) {
    if (type == FLOAT32) {
        store_floats((float *)numbers + index, v, count);
        return;
    }
    bfloat16 rounded[LANES];
    store_bfloat16(rounded, v);
    memcpy((bfloat16 *)numbers + index, rounded, smaller(count, LANES) * sizeof(bfloat16));
}

#endif

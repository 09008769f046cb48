/* What the passes of whole units take, for whoever measures them. Off unless it is asked for: then
   it costs one branch a pass. */
#ifndef TRITONBNN_CLOCK_H
#define TRITONBNN_CLOCK_H

#include "vector.h"

/* Python knows these by name, in this order. */
typedef enum {
    CLOCK_WEIGHT,
    CLOCK_SIGNS,
    CLOCK_PRODUCT,
    CLOCK_MOMENTS,
    CLOCK_ACTIVATION,
    CLOCK_SUMS,
    CLOCK_APPLY,
    CLOCK_INPUT_GRAD,
    CLOCK_WEIGHT_GRAD,
    CLOCK_INPUT,
    CLOCK_PASSES
} Clocked;

/* What a pass had to do at least: bytes to and from memory, and products of two numbers, one of
   them a sign, by table or by counting bits. */
typedef struct {
    int64_t bytes, table_products, bit_products;
} Work;

extern int tritonbnn_clock_is_on;

/* Nanoseconds of a clock that only goes forward; never 0. */
int64_t tritonbnn_clock_now(void);

/* Add what a pass took since then. */
void tritonbnn_clock_add(Clocked pass, int64_t since, Work work);

/* 0 while the clock is off. */
INLINE int64_t clock_start(void) { return tritonbnn_clock_is_on ? tritonbnn_clock_now() : 0; }

#endif

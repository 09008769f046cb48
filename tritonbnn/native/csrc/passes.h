/* The elementwise passes of a unit, each one sweep over memory, for whoever strings them together.

A unit computes t = (a - mean) * scale + offset + shift_mid + shortcut(stream) and
z = PReLU(t) + shift_out, where a is its convolution's output. Activations are (pixels, channels)
in memory, pixels being images * height * width, in this order. Results never depend on the number
of threads. Sums are float32 over short stretches of pixels, which float64 joins in a fixed order.
*/
#ifndef TRITONBNN_PASSES_H
#define TRITONBNN_PASSES_H

#include "numbers.h"

/* Python knows these numbers too. */
typedef enum { IDENTITY, REPEAT, POOL, NO_SHORTCUT } Shortcut;

/* What all passes of a unit share. Vectors are float32, one value per channel of z. */
typedef struct {
    int64_t images, height, width, channels; /* of z */
    Numbers a;                               /* z's shape, any type */
    Numbers stream;                          /* FLOAT32 or BFLOAT16 */
    Shortcut shortcut;                       /* IDENTITY: stream has z's shape. REPEAT: half its
                                                channels. POOL: twice its height and width. */
    const float *mean;                       /* NULL for 0 */
    const float *scale;                      /* gamma / deviation; NULL for 1 */
    const float *offset;                     /* NULL for 0 */
    const float *shift_mid;                  /* NULL for 0 */
    const float *slope;                      /* NULL for no PReLU: z = t */
    const float *shift_out;                  /* NULL for 0 */
} Unit;

/* Mean and biased variance per channel of a, (pixels, channels) of any type. Integers' sums are
exact, as long as float64 holds them. */
void pass_moments(Numbers a, int64_t pixels, int64_t channels, double *mean, double *variance,
                  int64_t threads);

/* z, FLOAT32 or BFLOAT16. signs are the packed signs of z as rounded + next_shift, or NULL.
next_shift may be NULL. */
void pass_forward(const Unit *unit, Numbers z, uint32_t *signs, const float *next_shift,
                  int64_t threads);

/* sums: [4][channels], the sums of du, of du * (a - mean), of grad * min(t, 0) and of grad, where
du = grad * (t > 0 ? 1 : slope). Writes du where it has memory. */
void pass_sums(const Unit *unit, Numbers grad, Numbers du, float *sums, int64_t threads);

/* dy = du_scale * du + a_scale * a + constant. Writes du too where it has memory, never rounded
before dy takes it. */
void pass_apply(const Unit *unit, Numbers grad, const float *du_scale, const float *a_scale,
                const float *constant, Numbers dy, Numbers du, int64_t threads);

/* The way back from a unit's signs to its input x. */
typedef struct {
    int64_t images, height, width, channels; /* of x */
    Numbers x;                               /* FLOAT32 or BFLOAT16, as are all here */
    Numbers dsigns;                          /* x's shape */
    Numbers du;                              /* of z's shape, or without memory for no shortcut */
    Shortcut shortcut;                       /* from x to z */
    const float *shift;                      /* NULL for 0 */
} Input;

/* dx = max(0, 2 - 2 abs(x + shift)) * dsigns + shortcut^T(du). dshift: [channels], the sums of the
first term. dx may be dsigns itself if they have one type. */
void pass_input(const Input *input, Numbers dx, float *dshift, int64_t threads);

#endif

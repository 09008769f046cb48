/* A real linear layer and its gradients, each sum in an order that the shapes fix.

   It is for a network's head. torch's library may part a sum among threads. */
#include "vector.h"

#include "geometry.h"

#define ROWS 4 /* of the result, whose sums stay in registers */

/* result[row][column] = sum over i of a[row, i] b[i][column], for some rows and 16 columns.
   a has the given strides; rows of b are inner columns long. */
INLINE void product_block(const float *a, int64_t a_row, int64_t a_inner, const float *b,
                          int64_t columns, int64_t inner, int64_t column, int rows, float *result) {
    vec sums[ROWS];
    int64_t count = smaller(LANES, columns - column);
    for (int r = 0; r < rows; r++) sums[r] = splat(0);
    for (int64_t i = 0; i < inner; i++) {
        vec numbers = load_some(b, FLOAT32, i * columns + column, count);
        for (int r = 0; r < rows; r++) sums[r] += a[r * a_row + i * a_inner] * numbers;
    }
    for (int r = 0; r < rows; r++)
        store_some(result, FLOAT32, r * columns + column, sums[r], count);
}

static void product(const float *a, int64_t a_row, int64_t a_inner, const float *b, int64_t rows,
                    int64_t columns, int64_t inner, float *result, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t column = 0; column < columns; column += LANES) {
        int64_t r = 0;
        for (; r + ROWS <= rows; r += ROWS)
            product_block(a + r * a_row, a_row, a_inner, b, columns, inner, column, ROWS,
                          result + r * columns);
        for (; r < rows; r++)
            product_block(a + r * a_row, a_row, a_inner, b, columns, inner, column, 1,
                          result + r * columns);
    }
}

/* x: (rows, inputs). weight: (outputs, inputs). bias: (outputs,) or NULL. y: (rows, outputs). */
EXPORT void tritonbnn_linear(const float *x, const float *weight, const float *bias, int64_t rows,
                             int64_t inputs, int64_t outputs, float *y, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t o = 0; o < outputs; o++)
        for (int64_t row = 0; row < rows; row++) {
            vec sums = splat(0);
            for (int64_t i = 0; i < inputs; i += LANES)
                sums += load_some(x, FLOAT32, row * inputs + i, inputs - i) *
                        load_some(weight, FLOAT32, o * inputs + i, inputs - i);
            float total = bias ? bias[o] : 0;
            for (int lane = 0; lane < LANES; lane++) total += sums[lane];
            y[row * outputs + o] = total;
        }
}

/* grad: (rows, outputs). dx: (rows, inputs). */
EXPORT void tritonbnn_linear_input_grad(const float *grad, const float *weight, int64_t rows,
                                        int64_t inputs, int64_t outputs, float *dx,
                                        int64_t threads) {
    product(grad, outputs, 1, weight, rows, inputs, outputs, dx, threads);
}

/* dweight: (outputs, inputs). */
EXPORT void tritonbnn_linear_weight_grad(const float *grad, const float *x, int64_t rows,
                                         int64_t inputs, int64_t outputs, float *dweight,
                                         int64_t threads) {
    product(grad, 1, outputs, x, outputs, inputs, rows, dweight, threads);
}

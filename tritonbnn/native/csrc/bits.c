#include "bits.h"

#include "workspace.h"

sign_map tritonbnn_padded_signs(const uint32_t *signs, const geometry *g, int threads) {
    int64_t words = words_of(g->channels), pad = g->padding;
    int64_t height = g->height + 2 * pad, row = (g->width + 2 * pad) * words;
    sign_map map = {signs, words, row, height * row};
    if (!pad) return map;
    size_t bytes = g->images * map.image * sizeof(uint32_t);
    uint32_t *padded = tritonbnn_workspace(WORKSPACE_PADDED, bytes);
    map.words = padded;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < g->images * height; r++) {
        int64_t image = r / height, y = r % height - pad;
        uint32_t *to = padded + r * row;
        memset(to, 0, row * sizeof *to);
        if (y < 0 || y >= g->height) continue;
        const uint32_t *from = signs + (image * g->height + y) * g->width * words;
        memcpy(to + pad * words, from, g->width * words * sizeof *to);
    }
    return map;
}

// attention_dq.cu -- dq = scale dS k for each head, from dS^T [heads][m][queries], which attention_dkv
// wrote down: the product of a weight's gradient, over the keys.
#include "attention_grad.cuh"
#include "product.cuh"

namespace {
constexpr int kQueries = 128;  // that a block owns, of a head

template <int D> struct Tile {
  using Product = ::Product<kWeight, kQueries, D, 2, D / 32>;
  static GPU_FN void run(const AttentionGrads& table) {
    const Place place = place_of(table, int(blockIdx.x));
    const AttentionGrad& p = table.problem[place.problem];
    const int n = p.q.rows, m = p.k.rows, head_dim = p.q.cols / p.heads, stride = ds_stride(n);
    const Matrix<const real> ds = {p.ds + int64_t(place.head) * m * stride, stride, m, stride};
    const auto k = head_of(p.k, place.head, head_dim);
    const auto dq = head_of(p.dq, place.head, head_dim);
    const float scale = score_scale(head_dim);
    SharedMemory shared;
    Product product{ds, k, place.part * kQueries, 0, {}};
    product.sum(shared.take<real>(Product::kSharedElements), 0, m, [](const real*) {});
    product.pieces([&](const float (&c)[4][4], int row, int column) { store_rows<32>(dq, row, column, c, scale); });
  }
};
}  // namespace

KERNEL(attention_dq_product_64, 128, const AttentionGrads table) { Tile<64>::run(table); }
KERNEL(attention_dq_product_128, 256, const AttentionGrads table) { Tile<128>::run(table); }

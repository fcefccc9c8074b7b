// The native CPU engine: a whole sequence of h_t = g_t(z_t) φ(z_t), z_t = x_t + h_{t-1} W, in one call.
//
//   forward     z_t = x_t + h_{t-1} W,  h_t = g_t(z_t) φ(z_t)                          t = 0 … T−1
//   backward    δh_t = ∂L/∂h_t + δz_{t+1} Wᵀ,  δz_t = δh_t · ∂h_t/∂z_t                  t = T−1 … 0
//   gradient    dW = Σ_t h_{t-1}ᵀ δz_t                                                 after the backward pass
//
// Beside it W = exp(S) and its adjoint, on the same tiles. The formulas are those of common/stair.py and
// common/orthogonal.py, written again because here they run on vectors still hot from the product.
//
// Why it is fast. Rows (examples) do not depend on each other, so every thread takes its share of the rows
// through all T steps and no thread ever waits for another. W is packed once per call into panels of a few
// vectors of columns, stored in the order in which they are read. A tile of the product is TILE_ROWS rows times
// one panel; its sums stay in registers for the whole depth H, then stair and nonlinearity finish the tile
// while it lies in the first-level cache. One panel serves all row tiles of the share before the next panel is
// touched, so a W that is larger than the cache (H ≥ 512) still comes from it. What a tile will be finished with
// (x_t; h_t, its gradient, the place of the result) comes from farther away than W and in no order that a processor
// foresees, so it is fetched while the tile is multiplied, a row at a time. (Tiles of register sums over packed panels:
// Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008; the time loop inside the kernel
// over blocked weights: Banerjee et al., "Optimizing deep learning RNN topologies on Intel architecture", 2019.)
//
// Every number of the result is summed in an order that depends on neither the tiling of the rows nor the
// number of threads: the result has the same bits for any number of threads. dW is shared by its rows.
//
// Denormal numbers are flushed to zero in here, always, and the caller's mode is restored. A gradient
// that fades through hundreds of steps spends most of them below 1e−38, where it teaches nothing and every
// operation takes a hundred times as long.
//
// Vectors are the vector extension of GCC and Clang: one source for AVX-512, AVX2, SSE2 and NEON. native_build.py
// compiles it once for STAIR_SCALAR=float and, when somebody asks for it, once more for STAIR_SCALAR=double.

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace {

using Index = std::ptrdiff_t;
using S = STAIR_SCALAR;  // float or double

// Their places in the lists of common/stair.py come from there, with the command that compiles this file.
enum Rule { SCALE = STAIR_SCALE, EXPONENTIAL = STAIR_EXPONENTIAL, LITERAL = STAIR_LITERAL };
enum Phi { NONE = STAIR_NONE, TANH = STAIR_TANH, RELU = STAIR_RELU, MODRELU = STAIR_MODRELU, SIGMOID = STAIR_SIGMOID };

// ---------------------------------------------------------------------------------------------- vectors

// A tile keeps TILE_ROWS × TILE_VECTORS sums in registers and needs TILE_VECTORS + 1 or 2 more of them: 24 of the
// 32 registers of AVX-512 and NEON, 12 of the 16 of AVX2 and SSE2. Both are enough independent
// sums to hide the latency of a fused multiply-add, and load far less than they multiply.
#if defined(__AVX512F__)
constexpr Index VECTOR_BYTES = 64, TILE_VECTORS = 4;
#elif defined(__AVX__)
constexpr Index VECTOR_BYTES = 32, TILE_VECTORS = 2;
#elif defined(__aarch64__)
constexpr Index VECTOR_BYTES = 16, TILE_VECTORS = 4;
#else
constexpr Index VECTOR_BYTES = 16, TILE_VECTORS = 2;
#endif
constexpr Index TILE_ROWS = 6;

using Integer = std::conditional_t<sizeof(S) == 4, std::int32_t, std::int64_t>;
typedef S Vector __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef Integer Bits __attribute__((vector_size(VECTOR_BYTES)));
constexpr Index LANES = VECTOR_BYTES / Index(sizeof(S));

inline Vector load(const S *from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline void store(S *to, Vector v) {
    std::memcpy(to, &v, sizeof v);
}

// Copies fewer numbers than a vector has, in pieces of halving size: no access outside the array.
inline void copy_few(S *to, const S *from, Index count) {
    for (Index piece = LANES / 2; piece > 0; piece /= 2)
        if (count & piece) {
            std::memcpy(to, from, std::size_t(piece) * sizeof(S));
            to += piece;
            from += piece;
        }
}

// The first `count` numbers of a vector; the rest reads as 0 and is not written.
inline Vector load(const S *from, Index count) {
    if (count >= LANES) return load(from);
    S few[LANES] = {};
    copy_few(few, from, count);
    return load(few);
}

inline void store(S *to, Vector v, Index count) {
    if (count >= LANES) return store(to, v);
    S few[LANES];
    store(few, v);
    copy_few(to, few, count);
}

inline double sum_of_lanes(Vector v) {
    double sum = 0;
    for (Index lane = 0; lane < LANES; lane++) sum += double(v[lane]);
    return sum;
}

// ------------------------------------------------------------------------- stair and nonlinearity, z → h

inline Vector absolute(Vector v) {
    return Vector(Bits(v) & std::numeric_limits<Integer>::max());
}

// |magnitude| with the sign of `sign`
inline Vector with_sign(Vector magnitude, Vector sign) {
    constexpr Integer sign_bit = std::numeric_limits<Integer>::min();
    return Vector((Bits(magnitude) & ~sign_bit) | (Bits(sign) & sign_bit));
}

struct Exponentials {
    Vector exp, expm1;  // e^v and e^v − 1, each to a few units in its own last place
};

// e^v = 2^n e^r with n the nearest integer to v / ln 2, so |r| ≤ ln 2 / 2, and e^r − 1 by its Taylor polynomial.
// Both results come from the same halves, 2^(n−1) e^r, so that neither overflows before e^v does.
inline Exponentials exponentials(Vector v) {
    constexpr bool single = sizeof(S) == 4;
    constexpr int mantissa = std::numeric_limits<S>::digits - 1, degree = single ? 7 : 13;
    constexpr Integer exponent_bias = std::numeric_limits<S>::max_exponent - 1;
    constexpr S lowest = single ? S(-86) : S(-707), highest = single ? S(89) : S(710);
    constexpr S ln2_high = single ? S(0.693359375) : S(0x1.62e42feep-1);  // few bits: n · ln2_high is exact
    constexpr S ln2_low = single ? S(-2.12194440054690582768e-4) : S(1.90821492927058770002e-10);  // the rest of ln 2
    constexpr S to_integer = S(3) * S(std::int64_t(1) << (mantissa - 1));  // adding it leaves v rounded in the low bits

    const Bits vanishes = v < lowest;
    Vector u = vanishes ? lowest - Vector{} : v;  // a NaN passes every comparison here unchanged
    u = u > highest ? highest - Vector{} : u;
    const Vector shifted = u * S(1.44269504088896340736) + to_integer;
    const Vector n = shifted - to_integer;
    const Vector r = (u - n * ln2_high) - n * ln2_low;

    S factorial = 1;
    S inverse[degree + 1] = {S(1)};
    for (int k = 1; k <= degree; k++) inverse[k] = S(1) / (factorial *= S(k));
    Vector p = inverse[degree] - Vector{};
    for (int k = degree - 1; k >= 1; k--) p = p * r + inverse[k];
    p *= r;  // e^r − 1

    const Bits n_bits = Bits(shifted) - Bits(to_integer - Vector{});
    const Vector half = Vector((n_bits + (exponent_bias - 1)) << mantissa);  // 2^(n−1)
    const Vector exp = S(2) * (half + half * p), expm1 = S(2) * ((half - S(0.5)) + half * p);
    return {vanishes ? Vector{} : exp, vanishes ? S(-1) - Vector{} : expm1};
}

// φ(z), and on request its derivatives with respect to z and to modReLU's b
struct Activation {
    Vector value, by_z, by_bias;
};

template <Phi phi>
inline Activation nonlinearity(Vector z, Vector bias) {
    const Vector zero = {}, one = S(1) - zero;
    if constexpr (phi == MODRELU) {
        const Vector reach = absolute(z) + bias;
        const Bits off = (reach <= 0) | (z == 0);  // sign(0) = 0: z = 0 gives 0 even where b > 0
        const Vector on = off ? zero : one;
        return {off ? zero : with_sign(reach, z), on, with_sign(on, z)};
    } else if constexpr (phi == RELU) {
        const Bits off = z <= 0;
        return {off ? zero : z, off ? zero : one, zero};
    } else if constexpr (phi == TANH) {
        const Vector e = exponentials(S(-2) * absolute(z)).expm1;
        const Vector tanh = with_sign(e / (e + S(2)), z);
        return {tanh, one - tanh * tanh, zero};
    } else if constexpr (phi == SIGMOID) {
        const Vector e = exponentials(-absolute(z)).exp;
        const Vector sigmoid = (z < 0 ? e : one) / (one + e);
        return {sigmoid, sigmoid * (one - sigmoid), zero};
    } else {
        return {z, one, zero};
    }
}

// h = g(z) φ(z) and its derivatives with respect to z, the step's number and modReLU's b
struct State {
    Vector value, by_z, by_number, by_bias;
};

template <Rule rule, Phi phi>
inline State state_from_z(Vector z, S number, Vector bias) {
    const Activation f = nonlinearity<phi>(z, bias);
    if constexpr (rule == SCALE) {
        return {number * f.value, number * f.by_z, f.value, number * f.by_bias};
    } else {
        const Vector zero = {}, one = S(1) - zero;
        const Vector size = rule == EXPONENTIAL ? absolute(z) : z;
        const Vector direction = rule == EXPONENTIAL ? (z == 0 ? zero : with_sign(one, z)) : one;
        const Exponentials e = exponentials(-number * size);
        const Vector g = -e.expm1;
        return {g * f.value, g * f.by_z + number * direction * e.exp * f.value, size * e.exp * f.value, g * f.by_bias};
    }
}

// The derivatives of h = ρ φ(z) from h alone: φ = h / ρ tells everything about z that they need. ρ ≠ 0.
template <Phi phi>
inline State scaled_state_from_h(Vector h, S number, S inverse) {
    const Vector zero = {}, size = number - zero;
    const Vector f = h * inverse;
    if constexpr (phi == MODRELU) {
        const Vector by_z = h == 0 ? zero : size;
        return {h, by_z, f, with_sign(by_z, h)};  // ρ sign(z) = |ρ| sign(h)
    } else if constexpr (phi == RELU) {
        return {h, h == 0 ? zero : size, f, zero};
    } else if constexpr (phi == TANH) {
        return {h, number * (S(1) - f * f), f, zero};
    } else if constexpr (phi == SIGMOID) {
        return {h, h * (S(1) - f), f, zero};
    } else {
        return {h, size, f, zero};
    }
}

// ------------------------------------------------------------------------------ the product, tile by tile

// Numbers that begin at a multiple of the vector's size, all 0 at first.
class Aligned {
public:
    explicit Aligned(Index count) : room(new S[std::size_t(count + LANES)]()) {
        const auto address = reinterpret_cast<std::uintptr_t>(room.get());
        first = room.get() + (std::uintptr_t(-std::intptr_t(address)) % VECTOR_BYTES) / sizeof(S);
    }
    S *data() { return first; }
    const S *data() const { return first; }

private:
    std::unique_ptr<S[]> room;
    S *first;
};

struct Panel {
    Index column, vectors;  // its first column of W and its width in vectors
};

// The panels of `hidden` columns: at most TILE_VECTORS vectors each, widths as equal as possible.
std::vector<Panel> panels_of(Index hidden) {
    const Index vectors = (hidden + LANES - 1) / LANES, count = (vectors + TILE_VECTORS - 1) / TILE_VECTORS;
    std::vector<Panel> panels;
    for (Index p = 0; p < count; p++) {
        const Index first = vectors * p / count, end = vectors * (p + 1) / count;
        panels.push_back({first * LANES, end - first});
    }
    return panels;
}

// Calls body(column, count) for the vectors of columns column … that lie inside a row of `hidden` numbers.
template <class Body>
inline void for_each_vector(Index column, Index vectors, Index hidden, Body body) {
    for (Index v = 0; v < vectors; v++, column += LANES) body(v * LANES, column, std::min(LANES, hidden - column));
}

// A matrix (depth, columns) in panels. Inside a panel a row follows the other; columns beyond the last are 0. Element
// (k, j) is read from matrix[k · in + j · out].
class Packed {
public:
    Packed(const S *matrix, Index in, Index out, Index depth, Index columns)
        : depth(depth), columns(columns), panels(panels_of(columns)), numbers((columns + LANES) * depth) {
        for (const Panel &panel : panels)
            if (matrix) pack(matrix, in, out, panel);
    }
    const S *data(const Panel &panel) const { return numbers.data() + panel.column * depth; }

    const Index depth, columns;
    const std::vector<Panel> panels;

private:
    // A row at a time, or else blocks of the depth, so that a column-wise read of the matrix still uses the whole of
    // each cache line.
    void pack(const S *matrix, Index in, Index out, const Panel &panel) {
        constexpr Index block = 16;
        const Index width = panel.vectors * LANES, count = std::min(width, columns - panel.column);
        S *to = numbers.data() + panel.column * depth;
        if (out == 1)
            for (Index k = 0; k < depth; k++)
                for_each_vector(panel.column, panel.vectors, columns, [&](Index offset, Index c, Index n) {
                    store(to + k * width + offset, load(matrix + k * in + c, n));
                });
        else
            for (Index start = 0; start < depth; start += block)
                for (Index j = 0; j < count; j++)
                    for (Index k = start; k < std::min(start + block, depth); k++)
                        to[k * width + j] = matrix[k * in + (panel.column + j) * out];
    }

    Aligned numbers;
};

// Rows of an array that will be needed soon: `first`, first + stride, … Null: none.
struct Stream {
    const S *first;
    Index stride;
};
using Streams = std::array<Stream, 5>;

// tile (ROWS, VECTORS) = rows (ROWS, depth) · panel (depth, VECTORS), all sums in registers. Element (r, k) of the rows
// is rows[r · row_stride + k · depth_stride]. A tile's width of each of its rows of `soon` is fetched meanwhile, a row
// at a time: more requests at once than the cache can have under way would stop the multiplication.
template <int ROWS, int VECTORS>
void multiply_tile(const S *rows, Index row_stride, Index depth_stride, const S *panel, Index depth, S *tile,
                   const Streams &soon) {
    Vector sums[ROWS][VECTORS] = {};
    Index k = 0;
    for (int part = 0; part < ROWS; part++) {
        for (const Stream &stream : soon)
            if (stream.first)
                for (int v = 0; v < VECTORS; v++)
                    __builtin_prefetch(stream.first + part * stream.stride + v * LANES);
        for (const Index end = depth * (part + 1) / ROWS; k < end; k++) {
            Vector w[VECTORS];
            for (int v = 0; v < VECTORS; v++) w[v] = load(panel + (k * VECTORS + v) * LANES);
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < VECTORS; v++) sums[r][v] += rows[r * row_stride + k * depth_stride] * w[v];
        }
    }
    Vector *out = reinterpret_cast<Vector *>(tile);
#pragma GCC unroll 16  // or GCC writes the sums to the stack first
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; v++) out[r * VECTORS + v] = sums[r][v];
}

using MultiplyTile = void (*)(const S *, Index, Index, const S *, Index, S *, const Streams &);

// multiply_tile for every size: entry (rows − 1) · TILE_VECTORS + (vectors − 1)
using Sizes = std::make_integer_sequence<int, TILE_ROWS * TILE_VECTORS>;
template <int... SIZE>
const MultiplyTile *tile_table(std::integer_sequence<int, SIZE...>) {
    static const MultiplyTile table[] = {multiply_tile<SIZE / TILE_VECTORS + 1, SIZE % TILE_VECTORS + 1>...};
    return table;
}

// Calls finish(row, column, vectors, sums) for every row and panel of rows · W; sums (vectors · LANES,) are that row's
// products in those columns, all 0 if `rows` is null. `streams` are the arrays that finish touches at row and column.
// Inlined, or GCC keeps what finish has captured in memory.
template <class Finish>
[[gnu::always_inline]] inline void product(const Packed &kernel, const S *rows, Index stride, Index count,
                                           const Streams &streams, Finish finish) {
    const MultiplyTile *table = tile_table(Sizes());
    alignas(VECTOR_BYTES) S tile[TILE_ROWS * TILE_VECTORS * LANES] = {};
    const Index tiles = (count + TILE_ROWS - 1) / TILE_ROWS;
    for (const Panel &panel : kernel.panels)
        for (Index i = 0; i < tiles; i++) {
            const Index first = count * i / tiles, height = count * (i + 1) / tiles - first;
            if (rows) {
                Streams soon = streams;
                for (Stream &stream : soon)
                    if (stream.first) stream.first += first * stream.stride + panel.column;
                table[(height - 1) * TILE_VECTORS + panel.vectors - 1](rows + first * stride, stride, 1,
                                                                       kernel.data(panel), kernel.depth, tile, soon);
            }
            for (Index r = 0; r < height; r++)
                finish(first + r, panel.column, panel.vectors, tile + r * panel.vectors * LANES);
        }
}

// ------------------------------------------------------------------------------------------------ threads

// For the lifetime of the object this thread's denormal results and operands are 0.
struct FlushDenormals {
#if defined(__SSE2__)
    const unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | 0x8040); }  // MXCSR: flush to zero, denormals are zero
    ~FlushDenormals() { _mm_setcsr(before); }
#elif defined(__aarch64__)
    std::uint64_t before;
    FlushDenormals() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        asm volatile("msr fpcr, %0" : : "r"(before | 1 << 24));  // FPCR.FZ
    }
    ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(before)); }
#endif
};

// GOMP_parallel(function, argument, threads, flags) of the OpenMP runtime that torch uses, or null
using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);

// The threads of a call.
//
// They are those of the OpenMP runtime in which torch works, where there is one. After a matrix product
// torch's idle threads spin for some milliseconds, waiting for more: threads of our own would have to share the
// cores with them, and short sequences would take twice as long.
struct Workers {
    Index threads;
    Parallel parallel;

    // Runs work(first, end) on `rows` rows in equal shares, one per thread, and returns when all are done. A thread
    // takes shares until none is left: it does not matter how many really come. Throws std::bad_alloc if memory ran out
    // in one of them.
    [[gnu::noinline]] void share(Index rows, const std::function<void(Index, Index)> &work) const {
        const Index count = std::max<Index>(1, std::min(threads, rows));
        std::atomic<Index> next{0};
        std::atomic<bool> out_of_memory{false};
        std::function<void()> take = [&] {
            const FlushDenormals flush;
            try {
                for (Index i; (i = next++) < count;) work(rows * i / count, rows * (i + 1) / count);
            } catch (const std::bad_alloc &) {
                out_of_memory = true;
            }
        };
        std::vector<std::thread> others;
        if (parallel && count > 1)
            parallel([](void *take) { (*static_cast<std::function<void()> *>(take))(); }, &take, unsigned(count), 0);
        else {
            try {
                while (Index(others.size()) < count - 1) others.emplace_back(take);
            } catch (const std::system_error &) {  // the system has no more threads to give
            }
            take();
        }
        for (std::thread &other : others) other.join();
        if (out_of_memory) throw std::bad_alloc();
    }
};

// What an entry point returns, where it has nothing else to tell
constexpr std::int64_t DONE = 0, OUT_OF_MEMORY = -1, NO_FORMULA = -2;

template <class Body>
std::int64_t guarded(Body body) {
    try {
        return body();
    } catch (const std::bad_alloc &) {
        return OUT_OF_MEMORY;
    }
}

// Calls body(constant) with the one of VALUES that is `wanted`; false if none is.
template <auto... VALUES, class Body>
bool with_constant(Index wanted, Body body) {
    return ((wanted == VALUES && (body(std::integral_constant<decltype(VALUES), VALUES>()), true)) || ...);
}

// Calls body(rule, phi) with both as constants.
template <class Body>
std::int64_t with_formula(Index rule, Index phi, Body body) {
    return guarded([&] {
        bool known = false;
        with_constant<SCALE, EXPONENTIAL, LITERAL>(rule, [&](auto r) {
            known = with_constant<NONE, TANH, RELU, MODRELU, SIGMOID>(phi, [&](auto p) { body(r, p); });
        });
        return known ? DONE : NO_FORMULA;
    });
}

// b padded to whole vectors; 0 where there is none
Aligned padded(const S *bias, Index hidden) {
    Aligned all(hidden + LANES);
    if (bias) std::memcpy(all.data(), bias, std::size_t(hidden) * sizeof(S));
    return all;
}

// ------------------------------------------------------------------------------------- the gradient of W

// to (depth, ROWS) = the first ROWS numbers of each row
template <int ROWS>
void pack_rows(const S *from, Index stride, Index depth, S *to) {
    for (Index k = 0; k < depth; k++) std::memcpy(to + k * ROWS, from + k * stride, ROWS * sizeof(S));
}

using PackRows = void (*)(const S *, Index, Index, S *);

template <int... ROWS>
const PackRows *pack_table(std::integer_sequence<int, ROWS...>) {
    static const PackRows table[] = {pack_rows<ROWS + 1>...};
    return table;
}

// d_kernel[i][j] += Σ_r previous[r][i] · dz[r][j] for i = first … end − 1 and `count` rows r. DEPTH of them at a time
// are packed in the order in which tiles read them.
void add_products(Index hidden, const S *previous, Index stride, const S *dz, Index count, Index first, Index end,
                  S *d_kernel) {
    constexpr Index DEPTH = 256, LINE = TILE_VECTORS * LANES, BLOCK = TILE_ROWS * LINE;
    constexpr Index FETCHED = 256 * DEPTH;  // numbers of a stretch that the second-level cache has room for
    const MultiplyTile *multiply = tile_table(Sizes());
    const PackRows *pack = pack_table(std::make_integer_sequence<int, TILE_ROWS>());
    const std::vector<Panel> panels = panels_of(hidden);
    const Index tiles = (end - first + TILE_ROWS - 1) / TILE_ROWS;
    const auto tile_start = [&](Index i) { return first + (end - first) * i / tiles; };
    Aligned left(DEPTH * (end - first)), right(DEPTH * LINE);
    alignas(VECTOR_BYTES) S tile[BLOCK];
    for (Index start = 0; start < count; start += DEPTH) {
        const Index depth = std::min(DEPTH, count - start);
        for (Index i = 0; i < tiles; i++) {
            const Index row = tile_start(i), height = tile_start(i + 1) - row;
            pack[height - 1](previous + start * stride + row, stride, depth, left.data() + (row - first) * depth);
        }
        // The next stretch lies far away: it is fetched while this one is multiplied, a block with every tile.
        const bool fetches = stride == hidden && DEPTH * hidden <= FETCHED;
        Index ahead = (start + depth) * hidden;
        const Index ahead_end = fetches ? std::min(start + 2 * DEPTH, count) * hidden : ahead;
        for (const Panel &panel : panels) {
            const Index width = panel.vectors * LANES;
            for (Index k = 0; k < depth; k++)
                for_each_vector(panel.column, panel.vectors, hidden, [&](Index offset, Index c, Index n) {
                    store(right.data() + k * width + offset, load(dz + (start + k) * hidden + c, n));
                });
            for (Index i = 0; i < tiles; i++) {
                const Index row = tile_start(i), height = tile_start(i + 1) - row;
                S *to = d_kernel + row * hidden;
                Streams soon = {{{to + panel.column, hidden}}};
                if (ahead < ahead_end) {
                    soon[1] = {previous + ahead, LINE}, soon[2] = {previous + ahead + BLOCK, LINE};
                    soon[3] = {dz + ahead, LINE}, soon[4] = {dz + ahead + BLOCK, LINE};
                    ahead += 2 * BLOCK;
                }
                const S *rows = left.data() + (row - first) * depth;
                const Index size = (height - 1) * TILE_VECTORS + panel.vectors - 1;
                multiply[size](rows, 1, height, right.data(), depth, tile, soon);
                for (Index r = 0; r < height; r++)
                    for_each_vector(panel.column, panel.vectors, hidden, [&](Index offset, Index c, Index n) {
                        S *place = to + r * hidden + c;
                        store(place, load(place, n) + load(tile + r * width + offset), n);
                    });
            }
        }
    }
}

// ---------------------------------------------------------------------------------- matrices of H × H numbers

// What W = exp(S) and its adjoint are made of, without a pass over a matrix for each sum.
struct Matrices {
    Index hidden;
    Workers workers;

    struct Term {
        S factor;
        const S *matrix;  // null: there is no such term
    };
    using Terms = std::array<Term, 3>;

    void add_to_diagonal(S *matrix, S number) const {
        for (Index i = 0; i < hidden; i++) matrix[i * (hidden + 1)] += number;
    }

    // to = fromᵀ, block by block: a column-wise access still uses the whole of each cache line.
    void transpose(S *to, const S *from) const {
        constexpr Index block = 16;
        workers.share((hidden + block - 1) / block, [&](Index first, Index end) {
            for (Index top = first * block; top < std::min(end * block, hidden); top += block)
                for (Index start = 0; start < hidden; start += block)
                    for (Index i = top; i < std::min(top + block, hidden); i++)
                        for (Index j = start; j < std::min(start + block, hidden); j++)
                            to[j * hidden + i] = from[i * hidden + j];
        });
    }

    static Vector sum(const Terms &terms, Index place, Index count) {
        Vector sum = {};
        for (const Term &term : terms)
            if (term.matrix) sum += term.factor * load(term.matrix + place, count);
        return sum;
    }

    // to = Σ terms
    void combine(S *to, const Terms &terms) const {
        workers.share(hidden, [&](Index first, Index end) {
            for (Index place = first * hidden; place < end * hidden; place += LANES) {
                const Index count = std::min(LANES, end * hidden - place);
                store(to + place, sum(terms, place, count), count);
            }
        });
    }

    // to = factor · x · y + Σ terms
    void multiply(S *to, S factor, const S *x, const S *y, const Terms &terms = {}) const {
        const Packed packed(y, hidden, 1, hidden, hidden);
        workers.share(hidden, [&](Index first, Index end) {
            const Index start = first * hidden;
            Streams streams = {{{to + start, hidden}}};
            for (Index i = 0; i < Index(terms.size()); i++)
                if (terms[i].matrix) streams[i + 1] = {terms[i].matrix + start, hidden};
            product(packed, x + start, hidden, end - first, streams,
                    [&](Index row, Index column, Index vectors, const S *products) {
                        for_each_vector(column, vectors, hidden, [&](Index offset, Index c, Index n) {
                            const Index place = start + row * hidden + c;
                            store(to + place, factor * load(products + offset) + sum(terms, place, n), n);
                        });
                    });
        });
    }
};

}  // namespace

// ------------------------------------------------------------------------------------------- entry points

// native_engine.py reads these argument lists and passes every argument by its name. Strides (_step, _row: from a step
// or a row to the next) count numbers, not bytes; the last dimension of an array is contiguous, W's excepted. Results
// are the pointers that are not const, null where they are not wanted. They return DONE or what is said of them.
extern "C" {

// h (T, B, H), or only the last state (B, H); z (T, B, H). Without a kernel z = x: the states of a kept z.
std::int64_t stair_forward(
    std::int64_t rule, std::int64_t phi, std::int64_t steps, std::int64_t batch, std::int64_t hidden,
    std::int64_t threads, Parallel parallel, const S *x, std::int64_t x_step, std::int64_t x_row, const S *kernel,
    std::int64_t kernel_in, std::int64_t kernel_out, const S *h0, std::int64_t h0_row, const S *numbers, const S *bias,
    S *z, S *h, S *last) {
    return with_formula(rule, phi, [&](auto r, auto p) {
        constexpr Rule RULE = decltype(r)::value;
        constexpr Phi PHI = decltype(p)::value;
        const Packed packed(kernel, kernel_in, kernel_out, hidden, hidden);
        const Aligned b = padded(bias, hidden);
        Workers{threads, parallel}.share(batch, [&](Index first, Index end) {
            const Index count = end - first, size = batch * hidden, row_stride = x_row, columns = hidden;
            std::vector<S> pair(h ? 0 : std::size_t(2 * count * columns));  // without h, two states take turns
            const S *previous = kernel ? h0 + first * h0_row : nullptr, *shift = b.data();
            Index stride = h0_row;
            for (Index t = 0; t < steps; t++) {
                const S *x_t = x + t * x_step + first * row_stride;
                const S number = numbers[t];
                S *z_t = z ? z + t * size + first * columns : nullptr;
                S *next = h ? h + t * size + first * columns : pair.data() + (t % 2) * count * columns;
                const Streams streams = {{{x_t, row_stride}, {next, columns}, {z_t, columns}}};
                product(packed, previous, stride, count, streams,
                        [=](Index row, Index column, Index vectors, const S *sums) {
                    for_each_vector(column, vectors, columns, [=](Index offset, Index c, Index n) {
                        const Vector found = load(sums + offset) + load(x_t + row * row_stride + c, n);
                        if (z_t) store(z_t + row * columns + c, found, n);
                        const State state = state_from_z<RULE, PHI>(found, number, load(shift + c));
                        store(next + row * columns + c, state.value, n);
                    });
                });
                previous = kernel ? next : nullptr;
                stride = columns;
            }
            if (last) std::memcpy(last + first * columns, previous, std::size_t(count * columns) * sizeof(S));
        });
    });
}

// dz (T, B, H), and where they are wanted d_h0 (B, H), d_numbers (T,) and d_bias (H,). grad is of h (T, B, H), or of
// the last state (B, H) if last_only. z is read if it was kept, else h.
std::int64_t stair_backward(
    std::int64_t rule, std::int64_t phi, std::int64_t steps, std::int64_t batch, std::int64_t hidden,
    std::int64_t threads, Parallel parallel, const S *grad, std::int64_t grad_step, std::int64_t grad_row,
    std::int64_t last_only, const S *kernel, std::int64_t kernel_in, std::int64_t kernel_out, const S *numbers,
    const S *bias, const S *z, const S *h, S *dz, S *d_h0, S *d_numbers, S *d_bias) {
    return with_formula(rule, phi, [&](auto r, auto p) {
        constexpr Rule RULE = decltype(r)::value;
        constexpr Phi PHI = decltype(p)::value;
        const Packed transposed(kernel, kernel_out, kernel_in, hidden, hidden);
        const Aligned b = padded(bias, hidden);
        // What each row adds to the gradients of the numbers (T, B) and of b (B, H). Added up at the end, in the order
        // of the rows: the sum is the same for any number of threads.
        std::vector<double> number_parts(d_numbers ? std::size_t(steps * batch) : 0);
        std::vector<S> bias_parts(d_bias ? std::size_t(batch * hidden) : 0);
        Workers{threads, parallel}.share(batch, [&](Index first, Index end) {
            const Index count = end - first, size = batch * hidden, row_stride = grad_row, columns = hidden;
            const S *shift = b.data();
            S *parts = d_bias ? bias_parts.data() + first * columns : nullptr;
            Aligned sums_of_rows(count * LANES);  // one vector of sums per row, for the gradient of the step's number
            S *number_sums = d_numbers ? sums_of_rows.data() : nullptr;
            const S *dz_next = nullptr;           // after the last step nothing flows back
            for (Index t = steps - 1; t >= 0; t--) {
                const S number = numbers[t], inverse = S(1) / number;
                const bool has_grad = !last_only || t == steps - 1;
                const S *grad_t = has_grad ? grad + (last_only ? 0 : t) * grad_step + first * row_stride : nullptr;
                const S *z_t = z ? z + t * size + first * columns : nullptr;
                const S *h_t = z_t ? nullptr : h + t * size + first * columns;
                S *dz_t = dz + t * size + first * columns;
                const Streams streams = {
                    {{grad_t, row_stride}, {z_t ? z_t : h_t, columns}, {dz_t, columns}, {parts, columns}}};
                product(transposed, dz_next, columns, count, streams,
                        [=](Index row, Index column, Index vectors, const S *sums) {
                    for_each_vector(column, vectors, columns, [=](Index offset, Index c, Index n) {
                        const Index place = row * columns + c;
                        Vector dh = load(sums + offset);
                        if (grad_t) dh += load(grad_t + row * row_stride + c, n);
                        State state;
                        if (RULE != SCALE || z_t)
                            state = state_from_z<RULE, PHI>(load(z_t + place, n), number, load(shift + c));
                        else
                            state = scaled_state_from_h<PHI>(load(h_t + place, n), number, inverse);
                        store(dz_t + place, dh * state.by_z, n);
                        if (number_sums) {
                            S *sum = number_sums + row * LANES;
                            store(sum, load(sum) + dh * state.by_number);
                        }
                        if (PHI == MODRELU && parts)
                            store(parts + place, load(parts + place, n) + dh * state.by_bias, n);
                    });
                });
                for (Index row = 0; number_sums && row < count; row++) {
                    S *sum = number_sums + row * LANES;
                    number_parts[t * batch + first + row] = sum_of_lanes(load(sum));
                    store(sum, Vector{});
                }
                dz_next = dz_t;
            }
            if (d_h0)
                product(transposed, dz_next, columns, count, {},
                        [=](Index row, Index column, Index vectors, const S *sums) {
                    for_each_vector(column, vectors, columns, [=](Index offset, Index c, Index n) {
                        store(d_h0 + (first + row) * columns + c, load(sums + offset), n);
                    });
                });
        });
        for (Index t = 0; d_numbers && t < steps; t++) {
            double sum = 0;
            for (Index row = 0; row < batch; row++) sum += number_parts[t * batch + row];
            d_numbers[t] = S(sum);
        }
        for (Index j = 0; d_bias && j < hidden; j++) {
            double sum = 0;
            for (Index row = 0; row < batch; row++) sum += double(bias_parts[row * hidden + j]);
            d_bias[j] = S(sum);
        }
    });
}

// Adds Σ_r previous_rᵀ δz_r to d_kernel (H, H): rows r of previous, and of the contiguous dz (rows, H).
std::int64_t stair_kernel_gradient(std::int64_t rows, std::int64_t hidden, std::int64_t threads, Parallel parallel,
                                   const S *previous, std::int64_t previous_row, const S *dz, S *d_kernel) {
    return guarded([&] {
        Workers{threads, parallel}.share(hidden, [&](Index first, Index end) {
            add_products(hidden, previous, previous_row, dz, rows, first, end, d_kernel);
        });
        return DONE;
    });
}

// S and S² (2, H, H) from the numbers above S's diagonal, row by row → how often S has to be halved until its norm is
// at most largest_norm
std::int64_t stair_square(std::int64_t hidden, std::int64_t threads, Parallel parallel, double largest_norm,
                          const S *logarithm, S *squares) {
    return guarded([&] {
        const Matrices m{hidden, {threads, parallel}};
        S *a = squares, *a2 = a + hidden * hidden;
        const S *above = logarithm;
        for (Index i = 0; i < hidden; above += hidden - ++i) {
            std::fill_n(a2 + i * hidden, i + 1, S(0));
            std::copy_n(above, hidden - i - 1, a2 + i * (hidden + 1) + 1);
        }
        m.transpose(a, a2);
        m.combine(a, {{{1, a2}, {-1, a}}});
        m.multiply(a2, 1, a, a);
        double largest = 0;  // √‖S²‖₁; S² is symmetric
        for (Index i = 0; i < hidden; i++) {
            Vector sums = {};
            for (Index j = 0; j < hidden; j += LANES)
                sums += absolute(load(a2 + i * hidden + j, std::min<Index>(LANES, hidden - j)));
            const double sum = sum_of_lanes(sums);
            largest = sum <= largest ? largest : sum;
        }
        const double halvings = std::ceil(std::log2(std::sqrt(largest) / largest_norm));
        return std::isfinite(halvings) ? std::int64_t(std::max(0.0, halvings)) : 0;
    });
}

// W = exp(S), by the formulas of common/orthogonal.py: the same products in the same order. Scales squares; kept
// (3 + squarings, H, H), the factors of its products and what is squared, is for the adjoint.
std::int64_t stair_exponential(std::int64_t hidden, std::int64_t threads, Parallel parallel, std::int64_t squarings,
                               const double *polynomial, S *squares, S *kept, S *rotation) {
    return guarded([&] {
        const Matrices m{hidden, {threads, parallel}};
        const Index size = hidden * hidden;
        S c[8], *a = squares, *a2 = a + size, *inner = kept, *left = inner + size, *right = left + size;
        // Y after i squarings; the last one is W
        const auto power = [&](Index i) { return i == squarings ? rotation : right + (i + 1) * size; };
        std::copy_n(polynomial, 8, c);
        const auto [x1, x2, x3, x4, x5, y1, y2, y3] = c;
        const S half = std::ldexp(S(1), -int(squarings));
        m.combine(a, {{{half, a}}});
        m.combine(a2, {{{half * half, a2}}});
        m.combine(inner, {{{1, a2}, {x2, a}}});
        m.add_to_diagonal(inner, x1);
        m.multiply(left, 1, a2, inner);
        m.combine(right, {{{1, left}, {x4, a}, {x5, a2}}});
        m.add_to_diagonal(right, x3);
        m.multiply(power(0), y3, left, right, {{{y1, a}, {y2, a2}}});
        m.add_to_diagonal(power(0), 1);
        for (Index i = 0; i < squarings; i++) m.multiply(power(i + 1), 1, power(i), power(i));
        return DONE;
    });
}

// The gradient of the numbers above S's diagonal from that of W. On transposed gradients: the adjoint at S is the
// derivative at S in the direction of the transposed gradient. room (6, H, H) is for what lies between.
std::int64_t stair_exponential_backward(std::int64_t hidden, std::int64_t threads, Parallel parallel,
                                        std::int64_t squarings, const double *polynomial, const S *squares,
                                        const S *kept, const S *grad_rotation, S *room, S *d_logarithm) {
    return guarded([&] {
        const Matrices m{hidden, {threads, parallel}};
        const Index size = hidden * hidden;
        const S *inner = kept, *left = inner + size, *right = left + size;
        S c[8];
        std::copy_n(polynomial, 8, c);
        const auto [x1, x2, x3, x4, x5, y1, y2, y3] = c;
        const S *a = squares, *a2 = a + size, half = std::ldexp(S(1), -int(squarings));
        S *grad = room + squarings % 2 * size, *d_right = room + 2 * size, *d_left = room + 3 * size;
        S *d_inner = room + 4 * size, *d_a2 = room + 5 * size, *both = d_left, *d_a = d_a2;
        m.transpose(grad, grad_rotation);
        for (Index i = squarings - 1; i >= 0; i--) {  // Y = X X
            S *next = room + i % 2 * size;
            const S *power = right + (i + 1) * size;
            m.multiply(next, 1, power, grad);
            m.multiply(next, 1, grad, power, {{{1, next}}});
            grad = next;
        }
        m.multiply(d_right, y3, grad, left);
        m.multiply(d_left, y3, right, grad, {{{1, d_right}}});
        m.multiply(d_inner, 1, d_left, a2);
        m.multiply(d_a2, 1, inner, d_left, {{{1, d_inner}, {y2, grad}, {x5, d_right}}});
        m.transpose(both, d_a2);
        m.combine(both, {{{1, both}, {1, d_a2}}});
        m.multiply(d_a, 1, a, both, {{{y1, grad}, {x4, d_right}, {x2, d_inner}}});
        m.transpose(both, d_a);
        m.combine(both, {{{half, both}, {-half, d_a}}});
        for (Index i = 0; i < hidden; i++)
            d_logarithm = std::copy_n(both + i * (hidden + 1) + 1, hidden - i - 1, d_logarithm);
        return DONE;
    });
}

}  // extern "C"

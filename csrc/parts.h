// Sixteen lanes where registers hold fewer: halves of halves, down to vectors that fill a register.
// Left to themselves compilers copy such a vector through memory, and take comparisons, selections
// and conversions of it apart into scalars. Source: own.
#pragma once
#include <cstdint>
#include <type_traits>

namespace shardlab::SHARDLAB_ISA {

#if defined(__AVX__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

template <class T, int N>
class Parts;

template <class T, int N, bool kFits = N * sizeof(T) <= kRegisterBytes>
struct LanesOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N>
struct LanesOf<T, N, false> {
  typedef Parts<T, N> type;
};

#define SHARDLAB_PARTS_INLINE friend inline __attribute__((always_inline))
#define SHARDLAB_PARTS_BINARY(op)                                      \
  SHARDLAB_PARTS_INLINE Parts operator op(Parts a, Parts b) {          \
    return {a.low op b.low, a.high op b.high};                         \
  }                                                                    \
  SHARDLAB_PARTS_INLINE Parts& operator op##=(Parts& a, Parts b) {     \
    return a = a op b;                                                 \
  }
#define SHARDLAB_PARTS_SHIFT(op)                                       \
  SHARDLAB_PARTS_INLINE Parts operator op(Parts a, Parts b) {          \
    return {a.low op b.low, a.high op b.high};                         \
  }                                                                    \
  SHARDLAB_PARTS_INLINE Parts operator op(Parts a, int by) {           \
    return {a.low op by, a.high op by};                                \
  }                                                                    \
  SHARDLAB_PARTS_INLINE Parts& operator op##=(Parts& a, int by) {      \
    return a = a op by;                                                \
  }
// All bits of a lane where it holds, as compilers' own vectors have it.
#define SHARDLAB_PARTS_COMPARISON(op)                                  \
  SHARDLAB_PARTS_INLINE Parts<int32_t, N> operator op(Parts a, Parts b) { \
    return {a.low op b.low, a.high op b.high};                         \
  }

// What a compiler's vector of N elements of 4 bytes can do: arithmetic with its like and with
// scalars, comparisons, and casts that keep the bits.
template <class T, int N>
class Parts {
 public:
  typedef typename LanesOf<T, N / 2>::type Half;
  Half low, high;

  Parts() = default;
  __attribute__((always_inline)) Parts(T x) : low(all(x)), high(low) {}
  __attribute__((always_inline)) Parts(Half low, Half high) : low(low), high(high) {}
  template <class U>
  __attribute__((always_inline)) explicit Parts(Parts<U, N> bits)
      : low((Half)bits.low), high((Half)bits.high) {}

  // From and to memory, a register at a time, at any address.
  __attribute__((always_inline)) static Parts load(const T* p) {
    if constexpr (std::is_class_v<Half>)
      return {Half::load(p), Half::load(p + N / 2)};
    else
      return {*(const Unaligned*)p, *(const Unaligned*)(p + N / 2)};
  }
  __attribute__((always_inline)) void store(T* p) const {
    if constexpr (std::is_class_v<Half>) {
      low.store(p);
      high.store(p + N / 2);
    } else {
      *(Unaligned*)p = low;
      *(Unaligned*)(p + N / 2) = high;
    }
  }

  SHARDLAB_PARTS_BINARY(+)
  SHARDLAB_PARTS_BINARY(-)
  SHARDLAB_PARTS_BINARY(*)
  SHARDLAB_PARTS_BINARY(/)
  SHARDLAB_PARTS_BINARY(&)
  SHARDLAB_PARTS_BINARY(|)
  SHARDLAB_PARTS_BINARY(^)
  SHARDLAB_PARTS_SHIFT(<<)
  SHARDLAB_PARTS_SHIFT(>>)
  SHARDLAB_PARTS_COMPARISON(<)
  SHARDLAB_PARTS_COMPARISON(>)
  SHARDLAB_PARTS_COMPARISON(>=)
  SHARDLAB_PARTS_COMPARISON(!=)
  SHARDLAB_PARTS_INLINE Parts operator~(Parts a) { return {~a.low, ~a.high}; }

 private:
  typedef T Unaligned __attribute__((vector_size(kRegisterBytes), aligned(4), may_alias));

  __attribute__((always_inline)) static Half all(T x) {
    if constexpr (std::is_class_v<Half>)
      return Half(x);
    else
      return x - Half{};  // a scalar spreads; x - 0 is x, -0 too
  }
};

#undef SHARDLAB_PARTS_INLINE
#undef SHARDLAB_PARTS_BINARY
#undef SHARDLAB_PARTS_SHIFT
#undef SHARDLAB_PARTS_COMPARISON

// Out of the halves of `in`, each by itself, down to registers.
template <class Out, class Body, class T, int N>
__attribute__((always_inline)) inline Out each(Parts<T, N> in, const Body& body) {
  typedef decltype(Out::low) Half;
  if constexpr (std::is_class_v<Half>)
    return {each<Half>(in.low, body), each<Half>(in.high, body)};
  else
    return {body(in.low), body(in.high)};
}

// Lanes of a where the mask's bits are set, else of b; of a compiler's vectors too.
template <class Mask, class V>
__attribute__((always_inline)) inline V pick(Mask mask, V a, V b) {
  if constexpr (std::is_class_v<V>)
    return {pick(mask.low, a.low, b.low), pick(mask.high, a.high, b.high)};
  else
    return mask ? a : b;
}

}  // namespace shardlab::SHARDLAB_ISA

// What XLA's operations do slowly on CPUs: reading and updating a few rows of
// large tables, of which each operation passes over all that the one before has
// written; sums of products, whose products it writes before it adds; sorting,
// of which the search for the largest is a part; and searching short lists, on
// one core and for as many rounds as the longest needs.
//
// Gradients are added in the order of the ids and products in lanes, whatever
// the number of threads, and compiled with -ffp-contract=off every compiler and
// processor gives the same bits.
//
// Shapes: R rows of a table, d their width, n rows touched (with repeats). A
// row holds its values and Adam's two moments side by side: [R, 3 * d]. An id
// outside [0, R) is padding.

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

// A second version of a function, for the processors that can.
#if defined(__x86_64__) && defined(__linux__)
#define MMM_JAX_ALSO_AVX2 __attribute__((target_clones("avx2", "default")))
#else
#define MMM_JAX_ALSO_AVX2
#endif

namespace ffi = xla::ffi;

namespace {

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

constexpr int64_t kPart = 256;  // rows that a thread takes at a time
constexpr int64_t kAhead = 8;   // and how far ahead of them memory is asked
constexpr int64_t kLine = 16;   // floats in a line of the cache
constexpr int64_t kLanes = 16;  // sums that go on side by side, a power of 2
constexpr int64_t kLists = 8;   // whose largest a thread finds at a time,
constexpr int64_t kGroup = 32;  // and numbers that it compares as a group
constexpr int32_t kNone = -1;

bool IsRow(int32_t id, int64_t num_rows) { return id >= 0 && id < num_rows; }

void Prefetch(const float* from, int64_t size) {
  for (int64_t k = 0; k < size; k += kLine) __builtin_prefetch(from + k, 1);
}

// Runs work(begin, end) for parts of [0, size) on XLA's threads. This one
// works, too, and waits only for parts that another has begun; so it ends even
// where all threads are here. A thread that comes late finds no part left and
// touches nothing that `work` refers to.
template <typename Work>
void InParts(ffi::ThreadPool pool, int64_t size, int64_t part_size,
             Work work) {
  struct Progress {
    std::atomic<int64_t> begun{0}, done{0};
  };
  const int64_t parts = (size + part_size - 1) / part_size;
  auto progress = std::make_shared<Progress>();
  auto take_parts = [=] {
    for (int64_t part; (part = progress->begun.fetch_add(1)) < parts;) {
      work(part * part_size, std::min((part + 1) * part_size, size));
      progress->done.fetch_add(1);
    }
  };
  for (int64_t i = 1; i < std::min(parts, pool.num_threads()); ++i) {
    pool.Schedule(std::decay_t<decltype(take_parts)>(take_parts));
  }
  take_parts();
  while (progress->done.load() < parts) std::this_thread::yield();
}

using Tasks = std::vector<std::function<void()>>;

void Run(ffi::ThreadPool pool, const Tasks& tasks) {
  const std::function<void()>* const task = tasks.data();
  InParts(pool, tasks.size(), 1, [=](int64_t i, int64_t) { task[i](); });
}

// The first d numbers of n rows as [n, d], zeros for padding.
void ReadRows(const float* table, int64_t num_rows, int64_t stride,
              const int32_t* id, int64_t n, float* to, int64_t d) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t ahead = i + kAhead;
    if (ahead < n && IsRow(id[ahead], num_rows)) {
      Prefetch(table + id[ahead] * stride, d);
    }
    if (IsRow(id[i], num_rows)) {
      std::copy_n(table + id[i] * stride, d, to + i * d);
    } else {
      std::fill_n(to + i * d, d, 0.0f);
    }
  }
}

// Links the places of each row in `id`: slot[row] is the first of them, next[i]
// the one behind i, or kNone. `slot` may come with any content: before a row's
// last place is passed, none that is behind it can be one of the row's.
void Link(const int32_t* id, int64_t n, int64_t num_rows, int32_t* slot,
          int32_t* next) {
  for (int64_t i = n - 1; i >= 0; --i) {
    const int64_t ahead = i - kAhead;
    if (ahead >= 0 && IsRow(id[ahead], num_rows)) {
      __builtin_prefetch(slot + id[ahead], 1);
    }
    next[i] = kNone;
    if (!IsRow(id[i], num_rows)) continue;
    const int32_t found = slot[id[i]];
    if (found > i && found < n && id[found] == id[i]) next[i] = found;
    slot[id[i]] = static_cast<int32_t>(i);
  }
}

// What comes before a step: the rows that it touches of some tables, and their
// places, linked for `Adam`. Of each table: rows with moments, slots, ids; and
// the results: slots, links, and as many arrays of rows as `reads` says, which
// follow each other in the ids.
ffi::Error Touch(ffi::ThreadPool pool, ffi::RemainingArgs args,
                 ffi::RemainingRets results, ffi::Span<const int64_t> reads) {
  // To link takes longest: it comes first, and reading fills up the rest.
  Tasks tasks, readings;
  size_t result = 0;
  for (size_t t = 0; t < reads.size(); ++t) {
    const Floats table = *args.get<Floats>(3 * t);
    const Ints slot = *args.get<Ints>(3 * t + 1);
    const Ints ids = *args.get<Ints>(3 * t + 2);
    const int64_t num_rows = table.dimensions()[0];
    const int64_t stride = table.dimensions()[1];
    int32_t* const first = (*results.get<Ints>(result++))->typed_data();
    int32_t* const next = (*results.get<Ints>(result++))->typed_data();
    // A result takes the place of its argument unless XLA needs both.
    if (first != slot.typed_data()) {
      std::copy_n(slot.typed_data(), num_rows, first);
    }
    const float* const from = table.typed_data();
    const int32_t* id = ids.typed_data();
    const int64_t n = ids.element_count();
    tasks.push_back([=] { Link(id, n, num_rows, first, next); });
    for (int64_t read = 0; read < reads[t]; ++read) {
      ffi::Result<Floats> rows = *results.get<Floats>(result++);
      const int64_t size = rows->dimensions()[0], d = rows->dimensions()[1];
      for (int64_t begin = 0; begin < size; begin += kPart) {
        const int64_t part = std::min(kPart, size - begin);
        float* const to = rows->typed_data() + begin * d;
        readings.push_back([=] {
          ReadRows(from, num_rows, stride, id + begin, part, to, d);
        });
      }
      id += size;
    }
  }
  tasks.insert(tasks.end(), readings.begin(), readings.end());
  Run(pool, tasks);
  return ffi::Error::Success();
}

// What a step of Adam needs besides gradients; `tables.optimizer` has the rule.
struct AdamStep {
  float b1, b2;            // decay of the moments
  float fresh1, fresh2;    // 1 - b1, 1 - b2
  float unbias1, unbias2;  // 1 / (1 - b1^t), 1 / (1 - b2^t)
  float rate, eps;
};

MMM_JAX_ALSO_AVX2
void TakeStep(const AdamStep& step, float* __restrict row,
              const float* __restrict grad, int64_t d) {
  const AdamStep s = step;
  float* __restrict mean = row + d;
  float* __restrict square = row + 2 * d;
  for (int64_t k = 0; k < d; ++k) {
    const float g = grad[k];
    mean[k] = s.b1 * mean[k] + s.fresh1 * g;
    square[k] = s.b2 * square[k] + s.fresh2 * (g * g);
    const float scale = std::sqrt(square[k] * s.unbias2) + s.eps;
    row[k] -= s.rate * (mean[k] * s.unbias1) / scale;
  }
}

// The sum of the gradients at place i and at those behind it.
const float* SumRepeats(const float* grads, int64_t d, const int32_t* next,
                        int64_t i, std::vector<float>& sum) {
  const float* const own = grads + i * d;
  if (next[i] == kNone) return own;
  sum.assign(own, own + d);
  while ((i = next[i]) != kNone) {
    for (int64_t k = 0; k < d; ++k) sum[k] += grads[i * d + k];
  }
  return sum.data();
}

// A table's part of a step.
struct Update {
  float* rows;
  const int32_t *first, *next, *id;
  const float* grads;
  int64_t num_rows, d;
};

// One step of Adam for the rows at places [begin, end) of a table's ids.
void UpdateRows(const AdamStep& step, const Update& u, int64_t begin,
                int64_t end) {
  const int64_t stride = 3 * u.d;
  std::vector<float> sum;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t ahead = i + kAhead;
    if (ahead < end && IsRow(u.id[ahead], u.num_rows)) {
      Prefetch(u.rows + u.id[ahead] * stride, stride);
      __builtin_prefetch(u.first + u.id[ahead]);
    }
    if (IsRow(u.id[i], u.num_rows) && u.first[u.id[i]] == i) {
      const float* total = SumRepeats(u.grads, u.d, u.next, i, sum);
      TakeStep(step, u.rows + u.id[i] * stride, total, u.d);
    }
  }
}

// One step of Adam for the touched rows of some tables, with the sums of their
// gradients. Of each table: rows with moments, slots, links, ids, gradients.
ffi::Error Adam(ffi::ThreadPool pool, Floats rate, Floats unbias1,
                Floats unbias2, ffi::RemainingArgs args,
                ffi::RemainingRets new_tables, float b1, float b2,
                float fresh1, float fresh2, float eps) {
  const AdamStep step{b1,
                      b2,
                      fresh1,
                      fresh2,
                      *unbias1.typed_data(),
                      *unbias2.typed_data(),
                      *rate.typed_data(),
                      eps};
  Tasks tasks;
  for (size_t t = 0; t < new_tables.size(); ++t) {
    const Floats table = *args.get<Floats>(5 * t);
    const Ints first = *args.get<Ints>(5 * t + 1);
    const Ints next = *args.get<Ints>(5 * t + 2);
    const Ints ids = *args.get<Ints>(5 * t + 3);
    const Floats grads = *args.get<Floats>(5 * t + 4);
    float* const rows = (*new_tables.get<Floats>(t))->typed_data();
    if (rows != table.typed_data()) {
      std::copy_n(table.typed_data(), table.element_count(), rows);
    }
    const Update update{rows,
                        first.typed_data(),
                        next.typed_data(),
                        ids.typed_data(),
                        grads.typed_data(),
                        table.dimensions()[0],
                        grads.dimensions()[1]};
    const int64_t n = ids.dimensions()[0];
    for (int64_t begin = 0; begin < n; begin += kPart) {
      const int64_t end = std::min(begin + kPart, n);
      tasks.push_back([=] { UpdateRows(step, update, begin, end); });
    }
  }
  Run(pool, tasks);
  return ffi::Error::Success();
}

// The sums of products of n rows with n others.
MMM_JAX_ALSO_AVX2
void DotRows(const float* __restrict left, const float* __restrict right,
             int64_t n, int64_t d, float* __restrict dots) {
  for (int64_t i = 0; i < n; ++i, left += d, right += d) {
    float sums[kLanes] = {};
    int64_t k = 0;
    for (; k + kLanes <= d; k += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        sums[lane] += left[k + lane] * right[k + lane];
      }
    }
    for (int64_t lane = 0; k + lane < d; ++lane) {
      sums[lane] += left[k + lane] * right[k + lane];
    }
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t lane = 0; lane < half; ++lane) {
        sums[lane] += sums[lane + half];
      }
    }
    dots[i] = sums[0];
  }
}

// For rows [..., d] and as many others their dot products [...].
ffi::Error Dot(ffi::ThreadPool pool, Floats left, Floats right,
               ffi::Result<Floats> dots) {
  const auto shape = left.dimensions();
  const auto other = right.dimensions();
  if (!std::equal(shape.begin(), shape.end(), other.begin(), other.end())) {
    return ffi::Error::InvalidArgument("rows are not as many, or as long");
  }
  const int64_t d = shape.back();
  const float* const lefts = left.typed_data();
  const float* const rights = right.typed_data();
  float* const to = dots->typed_data();
  InParts(pool, dots->element_count(), kPart, [=](int64_t begin, int64_t end) {
    const int64_t at = begin * d;
    DotRows(lefts + at, rights + at, end - begin, d, to + begin);
  });
  return ffi::Error::Success();
}

// How many of `seen` [size], which ascends, lie below the rank-th item that is
// not among them: below number k of it lie seen[k] - k others.
int64_t SeenBelow(const int32_t* seen, int64_t size, int32_t rank) {
  int64_t below = 0;
  while (size > 0) {
    const int64_t half = size / 2, at = below + half;
    const bool more = seen[at] - at <= rank;
    below = more ? at + 1 : below;
    size = more ? size - half - 1 : half;
  }
  return below;
}

// For ranks [..., n] of users [...] the items of these ranks among those that
// a user has not seen; `indices` from indptr[user] on are those seen, sorted.
ffi::Error UnseenItem(ffi::ThreadPool pool, Ints ranks, Ints users, Ints indptr,
                      Ints indices, ffi::Result<Ints> items) {
  const int64_t num = users.element_count(), n = ranks.dimensions().back();
  if (ranks.element_count() != num * n) {
    return ffi::Error::InvalidArgument("ranks are not [..., n] for users [...]");
  }
  const int32_t* const rank = ranks.typed_data();
  const int32_t* const user = users.typed_data();
  const int32_t* const start = indptr.typed_data();
  const int32_t* const seen = indices.typed_data();
  int32_t* const item = items->typed_data();
  InParts(pool, num, kPart, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i + 2 * kAhead < end) {
        __builtin_prefetch(start + user[i + 2 * kAhead]);
        __builtin_prefetch(seen + start[user[i + kAhead]]);
      }
      const int32_t first = start[user[i]];
      const int64_t size = start[user[i] + 1] - first;
      for (int64_t j = i * n; j < (i + 1) * n; ++j) {
        item[j] = rank[j] + SeenBelow(seen + first, size, rank[j]);
      }
    }
  });
  return ffi::Error::Success();
}

// Places of keys [..., P] in ascending order, equal keys as they stand: sorted
// by one byte after the other, from the lowest.
ffi::Error StableOrder(ffi::ThreadPool pool, ffi::Buffer<ffi::U32> keys,
                       ffi::Result<Ints> order) {
  const int64_t size = keys.dimensions().back();
  const int64_t num = size ? keys.element_count() / size : 0;
  const uint32_t* const all_keys = keys.typed_data();
  int32_t* const all_places = order->typed_data();
  InParts(pool, num, 1, [=](int64_t row, int64_t) {
    const uint32_t* const key = all_keys + row * size;
    int32_t* const out = all_places + row * size;
    std::vector<int32_t> from(size), to(size);
    std::iota(from.begin(), from.end(), 0);
    for (int shift = 0; shift < 32; shift += 8) {
      std::array<int64_t, 257> begin{};
      for (int64_t i = 0; i < size; ++i) ++begin[(key[i] >> shift & 255) + 1];
      std::partial_sum(begin.begin(), begin.end(), begin.begin());
      for (const int32_t place : from) {
        to[begin[key[place] >> shift & 255]++] = place;
      }
      from.swap(to);
    }
    std::copy(from.begin(), from.end(), out);
  });
  return ffi::Error::Success();
}

struct Found {
  float value;
  int32_t at;
};

// The largest number of every group of a row, group g being `row[g]` and each
// `groups`-th number from there on.
MMM_JAX_ALSO_AVX2
void LargestOfGroups(const float* __restrict row, int64_t groups, int64_t size,
                     float* __restrict most) {
  std::copy_n(row, groups, most);
  for (int64_t i = 1; i < size; ++i) {
    const float* __restrict next = row + i * groups;
    for (int64_t g = 0; g < groups; ++g) {
      most[g] = next[g] > most[g] ? next[g] : most[g];
    }
  }
}

// The k largest of row [n], the largest first. At least k numbers are as large
// as the k-th largest among the groups' largest: it bounds what to look for.
std::vector<Found> FindLargest(const float* row, int64_t n, int64_t k) {
  const int64_t size = std::clamp<int64_t>(n / k, 1, kGroup);
  const int64_t groups = n / size;
  std::vector<float> most(groups);
  LargestOfGroups(row, groups, size, most.data());
  std::vector<float> by_size = most;
  std::nth_element(by_size.begin(), by_size.begin() + k - 1, by_size.end(),
                   std::greater<float>());
  const float least = by_size[k - 1];
  std::vector<Found> found;
  auto look_at = [&](int64_t i) {
    if (row[i] >= least) found.push_back({row[i], static_cast<int32_t>(i)});
  };
  for (int64_t g = 0; g < groups; ++g) {
    if (most[g] < least) continue;
    for (int64_t i = 0; i < size; ++i) look_at(i * groups + g);
  }
  for (int64_t i = groups * size; i < n; ++i) look_at(i);
  std::partial_sort(
      found.begin(), found.begin() + k, found.end(),
      [](const Found& a, const Found& b) { return a.value > b.value; });
  return found;
}

// The k largest of each row [..., n] in descending order, and where they are.
ffi::Error Largest(ffi::ThreadPool pool, Floats rows,
                   ffi::Result<Floats> values, ffi::Result<Ints> places) {
  const int64_t n = rows.dimensions().back();
  const int64_t k = values->dimensions().back();
  const int64_t num = k ? values->element_count() / k : 0;
  const float* const from = rows.typed_data();
  float* const value = values->typed_data();
  int32_t* const place = places->typed_data();
  InParts(pool, num, kLists, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const std::vector<Found> found = FindLargest(from + i * n, n, k);
      for (int64_t j = 0; j < k; ++j) {
        value[i * k + j] = found[j].value;
        place[i * k + j] = found[j].at;
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mmm_jax_largest, Largest,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Ints>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(mmm_jax_dot, Dot,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(mmm_jax_unseen_item, UnseenItem,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Ret<Ints>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(mmm_jax_stable_order, StableOrder,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Ret<Ints>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(mmm_jax_touch_rows, Touch,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<ffi::Span<const int64_t>>("reads"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(mmm_jax_adam_rows, Adam,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<float>("b1")
                                  .Attr<float>("b2")
                                  .Attr<float>("fresh1")
                                  .Attr<float>("fresh2")
                                  .Attr<float>("eps"));

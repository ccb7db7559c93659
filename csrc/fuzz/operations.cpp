#include "operations.h"

namespace archer_fast::fuzzing {

Block<std::int64_t> some_ids(FuzzInput& input, IdRange live) {
  std::vector<std::int64_t> ids(input.below(8));
  for (std::int64_t& id : ids) {
    const std::uint8_t place = input.byte();
    const bool is_live = place < 240 && live.size() > 0;
    id = is_live        ? live.first + place % live.size()
         : place == 255 ? input.edge<std::int64_t>()
                        : live.end + place - 248;
  }
  return Block(ids);
}

bool are_all_in(IdRange range, const Block<std::int64_t>& ids) {
  for (const std::int64_t id : ids.span()) {
    if (!range.contains(id)) return false;
  }
  return true;
}

void evict_some(Bench& bench) {
  if (!bench.input.once_in(4)) return;
  constexpr std::size_t kPushOne = 4;
  push_something(bench, kPushOne);
}

int some_threads(FuzzInput& input) {
  return input.once_in(8) ? input.edge<std::int32_t>() : 1 + static_cast<int>(input.below(3));
}

Lengths::Lengths(FuzzInput& input) : until_wrong_(input.byte()), wrong_(until_wrong_ < 32 ? input.byte() : 0) {}

std::size_t Lengths::operator()(std::size_t wanted) {
  if (until_wrong_-- != 0) return wanted;
  const std::size_t length = wrong_ < 128 ? wrong_ : wanted + wrong_ - 192 < 64 ? wanted + wrong_ - 192 : wanted + 1;
  are_right_ = length == wanted;
  return length;
}

void operate(Bench& bench) {
  check_same(*bench.buffer, bench.plain);
  for (int i = 0; i < 64 && !bench.input.empty(); ++i) {
    const std::size_t choice = bench.input.byte();
    switch (choice % 6) {
      case 0:
        push_something(bench, choice / 6);
        break;
      case 1:
        draw_something(bench, choice / 6);
        break;
      case 2:
        read_something(bench, choice / 6);
        break;
      case 3:
        collate_trajectories(bench);
        break;
      case 4:
        collate_transitions(bench);
        break;
      default:
        use_features(bench, choice / 6);
        break;
    }
    check_same(*bench.buffer, bench.plain);
  }
  check_features(*bench.buffer, bench.plain);  // once: they may be large
}

}  // namespace archer_fast::fuzzing

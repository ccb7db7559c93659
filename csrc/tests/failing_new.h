// Memory that runs out where a test wants it to.
#pragma once

namespace archer_fast::testing {

// While one lives, the (countdown + 1)-th allocation of this thread and all after it throw std::bad_alloc.
class FailingNew {
 public:
  explicit FailingNew(int countdown) noexcept;
  ~FailingNew();
  FailingNew(const FailingNew&) = delete;
  FailingNew& operator=(const FailingNew&) = delete;
};

}  // namespace archer_fast::testing

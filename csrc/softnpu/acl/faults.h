// Faults planned on purpose: "CALL:N:CODE", comma separated: the n-th use of CALL from now on
// answers CODE. CALL@kernel fails on the stream instead; CALL@idle is launched and does nothing.
#pragma once

#include <string>
#include <vector>

#include "abi.h"

namespace softnpu {

SOFTNPU_CXX bool inject(const std::string& specs, std::string* problem);
// Why `specs` is refused; empty when it is taken.
std::string fault_problem(const std::string& specs);
bool faults_planned();
// The code planned for this use of `name`, counting the use; 0 = none.
int planned_fault(const std::string& name);
int injected_kernel_fault(const std::string& name);
SOFTNPU_CXX bool injected_idleness(const std::string& name);
std::vector<std::string> fired_faults();    // by call
std::vector<std::string> waiting_faults();  // as they were planned
// Names the planned faults that never fired on stderr, each one once.
void report_unfired();

}  // namespace softnpu

// Relations between the arguments of an operator that no specification line can say, as data: each
// is one of a few kinds, over arguments and terms (dsv4_backend.relations declares them).
#pragma once

#include <string>
#include <vector>

#include "term.h"

namespace dsv4::bind {

struct Call;

// A part of an error's words: text, then what is shown behind it.
struct Piece {
  std::string text;
  char shown;  // 't' the term, 's' sizes and 'd' dtype of an argument, 'n' an integer argument,
               // 'v' the value that is wrong, 'i' its index, ' ' nothing
  size_t position;
  std::optional<Term> term;
};
using Words = std::vector<Piece>;

// A number that terms of relations may name beside dimensions and integers.
struct Fact {
  size_t name;
  char of;  // 'g' the argument is given, 'r' its rank, 's' its size along `axis`, '8' it is e4m3,
            // '+' the number is above 0
  size_t position;
  size_t axis;
};

struct RelationRule {
  // std::invalid_argument for an unknown kind
  RelationRule(const std::string& kind, std::vector<std::string> names,
               std::vector<size_t> positions, std::vector<Term> terms, Words found, Words expected);

  std::vector<std::string> names;  // of its arguments; the first is the one that most errors name
  std::vector<size_t> positions;
  std::vector<Term> terms;
  Words found;
  Words expected;
  bool reads_values;
  void (*check)(const Call&);
};

}  // namespace dsv4::bind

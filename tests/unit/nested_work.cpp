// Runs what `nested_work.cuh` decides on a CPU, a thread for each of a block's, and checks it for random steps.
// Arguments: seed, rounds, the header. Says "ok", or what is wrong.

#include <algorithm>
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __shared__ static
struct Index {
    int x;
};
thread_local Index threadIdx, blockIdx, gridDim;
using std::max;
using std::min;
std::barrier all_threads(128);
void __syncthreads() { all_threads.arrive_and_wait(); }

#include HEADER

[[noreturn]] void fail(int round, const char *what) {
    std::printf("round %d: %s\n", round, what);
    std::exit(1);
}

struct Step {
    static constexpr int CAPACITY = 600;
    std::vector<Face> faces;
    std::vector<int> counts = std::vector<int>(MOST_FACES);
    int tokens, most_tokens, meeting_tiles, pairs = 0;
    std::vector<Unit> units;
    std::vector<Meeting> meetings;

    explicit Step(std::mt19937 &random) {
        auto draw = [&](int least, int most) { return least + (int)(random() % (most - least + 1)); };
        const int slots = draw(1, 8), most = draw(0, 3) ? draw(1, 40) : draw(1, 500);
        faces.resize(min(MOST_FACES, slots * draw(1, 8)));
        for (size_t i = 0; i < faces.size(); i++) {
            faces[i] = {(i64)i % slots, draw(0, 1) ? 2 : draw(0, 4), draw(1, 40), 0, 0, 0};
            pairs += counts[i] = draw(0, 3) ? draw(0, most) : 0;
        }
        const int tokens_of[] = {8, 16, 32, 48}, most_of[] = {0, 16, 1000};
        tokens = tokens_of[draw(0, 3)];
        most_tokens = most_of[draw(0, 2)];
        meeting_tiles = draw(8, MOST_PARTS);
        units.resize(max(1, min(pairs, (pairs + MOST_FACES * (tokens - 1)) / tokens)));
        meetings.resize(pairs + 1);
        std::memset(meetings.data(), 0xAB, meetings.size() * sizeof(Meeting));
        std::vector<std::thread> threads;
        for (int thread = 0; thread < MOST_FACES; thread++)
            threads.emplace_back([this, thread] {
                threadIdx.x = thread;
                list_units(faces.data(), counts.data(), (int)faces.size(), units.data(), (int)units.size(), tokens,
                           CAPACITY, meetings.data(), meeting_tiles, most_tokens);
            });
        for (std::thread &thread : threads) thread.join();
    }
    int num_meetings() const { return most_tokens ? meetings[0].meetings : 0; }
    // Which of all tiles holds a face's token.
    int tile_of(int face, int token) const {
        int tiles = 0;
        for (int other = 0; other < face; other++) tiles += (counts[other] + TILE - 1) / TILE;
        return tiles + token / TILE;
    }
    bool has(int face, int first, int count) const {
        return first >= face * CAPACITY && first + count <= face * CAPACITY + counts[face];
    }
};

void check_lists(const Step &step, int round) {
    std::map<int, int> times; // that a token is multiplied
    for (int i = 0; i < step.units[0].units; i++) {
        const Unit &unit = step.units[i];
        if (unit.tokens < 1 || unit.tokens > step.tokens) fail(round, "a unit's tokens");
        if (!step.has(unit.face, unit.first, unit.tokens)) fail(round, "a unit has others' tokens");
        if (unit.tile != step.tile_of(unit.face, unit.first % Step::CAPACITY)) fail(round, "where a unit's tokens lie");
        for (int k = 0; k < unit.tokens; k++) times[unit.first + k]++;
    }
    int before = 0;
    for (int i = 0; i < step.num_meetings(); i++) {
        const Meeting &meeting = step.meetings[i];
        if (meeting.tiles < 1 || meeting.tiles > step.meeting_tiles) fail(round, "a meeting's tiles");
        if (meeting.before != before || meeting.cost < 1) fail(round, "costs");
        before += meeting.cost;
        int tiles = 0;
        for (int part = 0; part < meeting.parts; part++) {
            const int face = meeting.faces[part], tokens = meeting.tokens[part], first = meeting.first[part];
            const Face &one = step.faces[face];
            if (one.slot != meeting.slot || step.counts[face] > step.most_tokens) fail(round, "who meets");
            if (tokens < 1 || tokens > TILE * PART_TILES || !step.has(face, first, tokens)) fail(round, "a part's tokens");
            if (meeting.tile[part] != step.tile_of(face, first % Step::CAPACITY)) fail(round, "where a part's tokens lie");
            const int own = tiles_for(tokens);
            if (meeting.codes[part] != (u32)(own | one.bits << 4 | one.step << 8)) fail(round, "a part's code");
            tiles += own;
            for (int k = 0; k < tokens; k++) times[first + k]++;
        }
        if (tiles != meeting.tiles) fail(round, "how many tiles a meeting has");
    }
    for (auto [token, count] : times)
        if (count != 1) fail(round, "a token twice");
    if ((int)times.size() != step.pairs) fail(round, "a token is left out");
}

// With tiles of so many steps: all of them are done, and who shares one finds the other.
template <int STEPS> void check_shares(const Step &step, int row_tiles, int blocks, int round) {
    struct Part {
        int first, last, block;
        bool is_first, is_last; // thing that the block does
    };
    std::map<std::pair<const Meeting *, int>, std::vector<Part>> tiles;
    gridDim.x = blocks;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        std::vector<Piece> pieces;
        for_each_piece<STEPS>(step.meetings.data(), row_tiles, [&](const Piece &piece) { pieces.push_back(piece); });
        for (size_t i = 0; i < pieces.size(); i++)
            tiles[{pieces[i].meeting, pieces[i].tile}].push_back(
                {pieces[i].first, pieces[i].last, blockIdx.x, i == 0, i + 1 == pieces.size()});
    }
    if ((int)tiles.size() != step.num_meetings() * row_tiles) fail(round, "a row tile is left out");
    for (const auto &[tile, parts] : tiles) {
        if (parts.size() > 2) fail(round, "a row tile is cut twice");
        if (parts.front().first != 0 || parts.back().last != STEPS) fail(round, "a row tile is not done");
        if (parts.size() == 1) continue;
        if (parts[0].last != parts[1].first || parts[0].last <= 0) fail(round, "the parts of a row tile");
        if (parts[1].block != parts[0].block + 1 || !parts[0].is_last || !parts[1].is_first)
            fail(round, "who shares a row tile");
    }
}

int main(int, char **arguments) {
    std::mt19937 random(std::atoi(arguments[1]));
    for (int round = 0; round < std::atoi(arguments[2]); round++) {
        const Step step(random);
        check_lists(step, round);
        if (step.num_meetings() == 0) continue;
        check_shares<2>(step, 1 + random() % 30, 1 + random() % 144, round);
        check_shares<8>(step, 150, 132, round);
        check_shares<28>(step, 1 + random() % 150, 1 + random() % 144, round);
    }
    std::puts("ok");
}
